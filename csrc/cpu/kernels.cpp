// Every CPU kernel for one instruction set, FL_ISA. The build compiles this file once for each.
#include "cpu/linear/dropout.h"
#include "cpu/merge/without_receipt.h"
#include "cpu/linear/gradient.h"
#include "cpu/merge/merge.h"
#include "cpu/linear/lora_linear.h"
#include "cpu/linear/call.h"
#include "cpu/table.h"

namespace fastlora::FL_ISA {
namespace {

int32_t linear(const LinearArgs& a) { return linear_with<LoRARows>(a); }

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
