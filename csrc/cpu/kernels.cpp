// Every CPU kernel for one instruction set, FL_ISA. The build compiles this file once for each.
#include <type_traits>

#include "cpu/linear/dropout.h"
#include "cpu/merge/without_receipt.h"
#include "cpu/linear/gradient.h"
#include "cpu/merge/merge.h"
#include "cpu/linear/lora_linear.h"
#include "cpu/table.h"

namespace fastlora::FL_ISA {
namespace {

// call(value of the type) for a dtype code.
template <class Call>
int32_t with_type(int32_t dtype, Call call) {
    if (dtype == FASTLORA_FLOAT32) return call(float{});
    if (dtype == FASTLORA_BFLOAT16) return call(bf16{});
    if (dtype == FASTLORA_FLOAT16) return call(f16{});
    return FASTLORA_BAD_ARGUMENT;
}

// call(value of x's type, value of the adapter's), which is x's or float32.
template <class Call>
int32_t with_types(int32_t dtype, int32_t lora_dtype, Call call) {
    return with_type(dtype, [&](auto x) {
        if (lora_dtype == dtype) return call(x, x);
        return lora_dtype == FASTLORA_FLOAT32 ? call(x, float{}) : FASTLORA_BAD_ARGUMENT;
    });
}

template <class T>
T* as(void* p) {
    return static_cast<T*>(p);
}

template <class T>
const T* as(const void* p) {
    return static_cast<const T*>(p);
}

// A matrix of any strides and type as one of unit columns and type To.
template <class To, class From>
Buffer<To> copied(const From* from, int64_t rows, int64_t columns, int64_t row, int64_t column) {
    Buffer<To> to(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
        int64_t j = 0;
        if (column == 1)
            for (; j + W <= columns; j += W) store(&to[i * columns + j], load(from + i * row + j));
        for (; j < columns; ++j)
            to[i * columns + j] = narrow<To>(widen(from[i * row + j * column]));
    }
    return to;
}

template <class X, class T>
void linear_of(const LinearArgs& a, const T* A, int64_t lda, const T* B, int64_t ldb,
               const float* lora_bias, const Pages<T>* pages = nullptr) {
    // clang-format off
    const Rows<X, T> rows{
        {a.M, a.K, a.N, pages ? pages->most : a.R, a.S}, as<X>(a.y), a.ldy, as<X>(a.h), a.ldh,
        as<X>(a.x), a.ldx, as<X>(a.weight), a.ldw, as<X>(a.bias), A, a.lda_slot, lda,
        B, a.ldb_slot, ldb, lora_bias, a.order, a.starts, a.scalings, a.ranks, a.row_scales,
        a.threads, pages};
    // clang-format on
    LoRARows<X, T>(rows).run();
}

// Rows from which on float32 factors that kernels narrow are narrowed once, not by every block.
constexpr int64_t MANY = 32;

int32_t linear(const LinearArgs& a) {
    return with_types(a.x_dtype, a.lora_dtype, [&](auto x, auto t) {
        using X = decltype(x);
        using T = decltype(t);
        const T *A = as<T>(a.A), *B = as<T>(a.B);
        if (a.page) {
            const Pages<T> pages(a);
            linear_of<X, T>(a, A, a.lda, B, a.ldb, nullptr, &pages);
            return FASTLORA_OK;
        }
        Buffer<float> bias;
        if (a.lora_bias) bias = copied<float>(as<T>(a.lora_bias), 1, a.N, 0, 1);
        const float* lora_bias = a.lora_bias ? bias.get() : nullptr;
        const auto with = [&](auto to) {
            using To = decltype(to);
            const auto left = copied<To>(A, a.R, a.K, a.lda, a.lda_column);
            const auto right = copied<To>(B, a.N, a.R, a.ldb, a.ldb_column);
            linear_of<X, To>(a, left.get(), a.K, right.get(), a.R, lora_bias);
        };
        if (!std::is_same_v<X, T> && Packets<X>::PER == 2 && a.S == 1 && a.M > MANY)
            with(X{});
        else if (a.lda_column != 1 || a.ldb_column != 1)
            with(T{});
        else
            linear_of<X, T>(a, A, a.lda, B, a.ldb, lora_bias);
        return FASTLORA_OK;
    });
}

int32_t gradient(const GradientArgs& a) {
    return with_types(a.dtype, a.out_dtype, [&](auto x, auto t) {
        using X = decltype(x);
        FL_ISA::gradient(as<decltype(t)>(a.out), a.out_row, a.out_column, as<X>(a.left), a.ld_left,
                         as<X>(a.right), a.ld_right, a.M, a.R, a.C, a.scaling, a.threads);
        return FASTLORA_OK;
    });
}

int32_t dropout(const DropoutArgs& a) {
    return with_type(a.dtype, [&](auto x) {
        using X = decltype(x);
        FL_ISA::dropout(as<X>(a.out), a.ldo, as<X>(a.x), a.ldx, a.M, a.K, a.first_row, a.seed,
                        a.threshold, a.scale, a.add, a.threads);
        return FASTLORA_OK;
    });
}

template <class T>
Weight<T> weight_of(const MergeArgs& a) {
    return {as<T>(a.weight), a.row, a.column, a.N, a.K};
}

int32_t merge(const MergeArgs& a, Receipt& receipt) {
    const Delta delta(a.A, a.B, a.N, a.K, a.R);
    return with_type(a.dtype, [&](auto t) {
        using T = decltype(t);
        return Merge<T>(weight_of<T>(a), delta, a.threads).merge(receipt);
    });
}

bool merge_without_receipt(const MergeArgs& a) {
    const Delta delta(a.A, a.B, a.N, a.K, a.R);
    const int32_t done = with_type(a.dtype, [&](auto t) -> int32_t {
        using T = decltype(t);
        return MergeWithoutReceipt<T>(weight_of<T>(a), delta, a.threads).merge();
    });
    return done == 1;
}

int32_t undo(const MergeArgs& a, const Receipt& receipt) {
    const Delta delta(a.A, a.B, a.N, a.K, a.R);
    return with_type(a.dtype, [&](auto t) {
        using T = decltype(t);
        Merge<T>(weight_of<T>(a), delta, a.threads).undo(receipt);
        return FASTLORA_OK;
    });
}

int32_t unmerge(const MergeArgs& a, const ReceiptArgs& receipt) {
    const Delta delta(a.A, a.B, a.N, a.K, a.R);
    return with_type(a.dtype, [&](auto t) {
        using T = decltype(t);
        return Merge<T>(weight_of<T>(a), delta, a.threads)
            .unmerge(receipt.positions, as<T>(receipt.bits), receipt.counts, receipt.merged,
                     receipt.whole);
    });
}

}  // namespace

#define FL_TEXT(name) FL_TEXT_(name)
#define FL_TEXT_(name) #name
extern const Table table = {FL_TEXT(FL_ISA),       linear, gradient, dropout, merge,
                            merge_without_receipt, undo,   unmerge,  digest};

}  // namespace fastlora::FL_ISA
