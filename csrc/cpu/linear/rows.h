// What one call asks for: rows of x, their adapters, and where the results go.
#pragma once

#include <algorithm>

#include "cpu/linear/expand.h"
#include "cpu/linear/pages.h"
#include "cpu/linear/prefetch.h"

namespace fastlora::FL_ISA {

// A row's work is the same whatever surrounds it: so are its bits.
struct Shape {
    int64_t M, K, N, R, S;
};

template <class X, class T>
struct Rows {
    Shape shape;
    X* y;
    int64_t ldy;
    X* h;
    int64_t ldh;
    const X* x;
    int64_t ldx;
    const X* weight;  // or null: y is added to
    int64_t ldw;
    const X* bias;
    const T* A;
    int64_t lda_slot, lda;
    const T* B;
    int64_t ldb_slot, ldb;
    const float* lora_bias;
    const int64_t* order;  // null: 0, 1, 2, ...
    const int64_t* starts;
    const float* scalings;
    const int32_t* ranks;
    const float* row_scales;
    int threads;
    const Pages<T>* pages;  // or null: A and B are as above. h is not written then

    int64_t row(int64_t i) const { return order ? order[i] : i; }

    Slot<T> slot(int64_t s) const {
        if (s < 0) return {};
        if (pages) return pages->slot(s);
        const int64_t r = ranks ? std::clamp<int64_t>(ranks[s], 0, shape.R) : shape.R;
        return {r, A + s * lda_slot, B + s * ldb_slot, lora_bias};
    }

    // Whether rows of this slot are changed at all.
    bool idle(int64_t s) const { return s < 0 || (slot(s).r == 0 && !lora_bias); }

    float scale(int64_t s, int64_t i) const {
        return scalings[s] * (row_scales ? row_scales[row(i)] : 1.0f);
    }

    // visit(slot, first, count) for [first, last) of the grouped rows, cut where the slot changes.
    template <class Visit>
    void segments(int64_t first, int64_t last, Visit visit) const {
        if (first < std::min(starts[0], last)) visit(-1, first, std::min(starts[0], last) - first);
        int64_t s = std::upper_bound(starts, starts + shape.S + 1, first) - starts - 1;
        for (s = std::max<int64_t>(s, 0); s < shape.S && starts[s] < last; ++s) {
            const int64_t from = std::max(starts[s], first), to = std::min(starts[s + 1], last);
            if (from < to) visit(s, from, to - from);
        }
    }

    // Every slot's B for outputs n ... n + count - 1 of `many` rows from `first` on, to be fetched.
    void collect_B(Prefetch<T>& all, int64_t first, int64_t many, int64_t n, int64_t count) const {
        all.clear(pages ? 1 : ldb, count);
        segments(first, first + many, [&](int64_t s, int64_t, int64_t) {
            const Slot<T> slot = this->slot(s);
            if (pages)
                for (int64_t r = 0; r < slot.r; ++r) all.add(slot.B_ranks[r] + n);
            else if (slot.r)
                all.add(slot.B + n * ldb);
        });
    }
};

}  // namespace fastlora::FL_ISA
