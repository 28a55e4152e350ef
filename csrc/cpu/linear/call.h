// From the C function's arguments to a kernel of the right types.
#pragma once

#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/linear/rows.h"
#include "cpu/table.h"
#include "fastlora.h"

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
        // Of the others, too, a vector's rounding: it may flush subnormal numbers.
        for (; j < columns; j += W) {
            const int64_t count = std::min<int64_t>(W, columns - j);
            float line[W] = {};
            To rounded[W];
            for (int64_t c = 0; c < count; ++c) line[c] = widen(from[i * row + (j + c) * column]);
            store(rounded, load(line));
            std::memcpy(&to[i * columns + j], rounded, count * sizeof(To));
        }
    }
    return to;
}

template <template <class, class> class Kernel, class X, class T>
void linear_of(const LinearArgs& a, const T* A, int64_t lda, const T* B, int64_t ldb,
               const float* lora_bias, const Pages<T>* pages = nullptr) {
    // clang-format off
    const Rows<X, T> rows{
        {a.M, a.K, a.N, pages ? pages->most : a.R, a.S}, as<X>(a.y), a.ldy, as<X>(a.h), a.ldh,
        as<X>(a.x), a.ldx, as<X>(a.weight), a.ldw, as<X>(a.bias), A, a.lda_slot, lda,
        B, a.ldb_slot, ldb, lora_bias, a.order, a.starts, a.scalings, a.ranks, a.row_scales,
        a.threads, pages};
    // clang-format on
    Kernel<X, T>(rows).run();
}

// Rows from which on float32 factors that kernels narrow are narrowed once, not by every block.
constexpr int64_t MANY = 32;

// A call of types X and T by Kernel<X, T>.
template <template <class, class> class Kernel, class X, class T>
int32_t linear_by(const LinearArgs& a) {
    const T *A = as<T>(a.A), *B = as<T>(a.B);
    if (a.page) {
        const Pages<T> pages(a);
        linear_of<Kernel, X, T>(a, A, a.lda, B, a.ldb, nullptr, &pages);
        return FASTLORA_OK;
    }
    Buffer<float> bias;
    if (a.lora_bias) bias = copied<float>(as<T>(a.lora_bias), 1, a.N, 0, 1);
    const float* lora_bias = a.lora_bias ? bias.get() : nullptr;
    const auto with = [&](auto to) {
        using To = decltype(to);
        const auto left = copied<To>(A, a.R, a.K, a.lda, a.lda_column);
        const auto right = copied<To>(B, a.N, a.R, a.ldb, a.ldb_column);
        linear_of<Kernel, X, To>(a, left.get(), a.K, right.get(), a.R, lora_bias);
    };
    if (!std::is_same_v<X, T> && Packets<X>::PER == 2 && a.S == 1 && a.M > MANY)
        with(X{});
    else if (a.lda_column != 1 || a.ldb_column != 1)
        with(T{});
    else
        linear_of<Kernel, X, T>(a, A, a.lda, B, a.ldb, lora_bias);
    return FASTLORA_OK;
}

template <template <class, class> class Kernel>
int32_t linear_with(const LinearArgs& a) {
    return with_types(a.x_dtype, a.lora_dtype, [&](auto x, auto t) {
        return linear_by<Kernel, decltype(x), decltype(t)>(a);
    });
}

}  // namespace
}  // namespace fastlora::FL_ISA
