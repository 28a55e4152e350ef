// sum[n] = start[n] + sum over ranks of h[r] * B[n, r] for W neighbouring outputs at a time.
//
// B is read as stored: W of its rows, four ranks' worth of 32-bit units each, are transposed in
// registers into columns of W outputs. Ranks are summed in their order for every row alike.
#pragma once

#include <algorithm>

#include "cpu/linear/packets.h"

namespace fastlora::FL_ISA {

// Ranks that one transposition takes.
template <class X>
constexpr int QUAD = 4 * Packets<X>::PER;

template <class X>
constexpr int64_t quads(int64_t r) {
    return (r + QUAD<X> - 1) / QUAD<X>;
}

// One quad of ranks of W rows of B as columns.
template <class X, class T>
inline void whole_quad(F out[4], const T* B, int64_t ldb) {
    Q q[W];
    for (int n = 0; n < W; ++n) q[n] = Packets<X>::quad(B + n * ldb);
    columns(out, q);
}

// The same of `rows` rows and `ranks` ranks, which may be fewer: what lies past the rank is not
// this slot's.
template <class X, class T>
inline void part_quad(F out[4], const T* B, int64_t ldb, int64_t rows, int64_t ranks) {
    Q q[W];
    for (int n = 0; n < W; ++n) {
        T padded[QUAD<X>] = {};
        std::memcpy(padded, B + std::min<int64_t>(n, rows - 1) * ldb,
                    std::min<int64_t>(QUAD<X>, ranks) * sizeof(T));
        q[n] = Packets<X>::quad(padded);
    }
    columns(out, q);
}

// A slot: how many ranks count, its factors, and lora_bias (or null). In pages, in place of the
// factors: where each rank's row of A and of B lies.
template <class T>
struct Slot {
    int64_t r = 0;
    const T *A = nullptr, *B = nullptr;
    const float* bias = nullptr;
    const T *const *A_ranks = nullptr, *const *B_ranks = nullptr;
};

// What a slot adds to `rows` rows: h_row(i) is a row of h, finish(i, n, width, sum) takes the sums
// of row i for outputs n ... n + width - 1 of [0, N).
template <class X, class T, class Row, class Finish>
struct Expand {
    Slot<T> slot;
    const T* next;  // what is read after this slot's B, or null
    int64_t ldb, N, rows;
    Row h_row;
    Finish finish;
    F* scratch;  // [panel_size(r)]

    F start(int64_t n, int64_t width) const {
        return slot.bias ? load_some(slot.bias + n, width) : zero();
    }

    void come_closer(int64_t n, int64_t width) const {
        if (!next) return;
        // Of rows that share a line, one.
        const int64_t row = std::max<int64_t>(1, ldb * int64_t(sizeof(T)));
        const int64_t step = std::max<int64_t>(1, 64 / row);
        for (int64_t i = 0; i < width; i += step) __builtin_prefetch(next + (n + i) * ldb, 0, 2);
    }

    // Whole vectors and quads: columns of COUNT vectors stay in registers while the rows pass by.
    template <int QUADS, int COUNT>
    int64_t in_registers() const {
        int64_t n = 0;
        for (; n + COUNT * W <= N; n += COUNT * W) {
            come_closer(n, COUNT * W);
            F column[COUNT][QUADS * 4], first[COUNT];
            for (int v = 0; v < COUNT; ++v) {
                for (int q = 0; q < QUADS; ++q)
                    whole_quad<X>(column[v] + q * 4, slot.B + (n + v * W) * ldb + q * QUAD<X>, ldb);
                first[v] = start(n + v * W, W);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const auto* h = h_row(i);
                F sum[COUNT];
                for (int v = 0; v < COUNT; ++v) sum[v] = first[v];
                for (int c = 0; c < QUADS * 4; ++c)
                    for (int v = 0; v < COUNT; ++v)
                        sum[v] = Packets<X>::step(sum[v], column[v][c], h + c * Packets<X>::PER);
                for (int v = 0; v < COUNT; ++v) finish(i, n + v * W, W, sum[v]);
            }
        }
        return n;
    }

    // Any rank, any rest of the outputs, with the same order of sums.
    void in_memory(int64_t n) const {
        for (; n < N; n += W) {
            const int64_t width = std::min<int64_t>(W, N - n), count = quads<X>(slot.r) * 4;
            come_closer(n, width);
            for (int64_t r = 0; r < slot.r; r += QUAD<X>) {
                F* out = scratch + r / Packets<X>::PER;
                const T* B = slot.B + n * ldb + r;
                if (width == W && r + QUAD<X> <= slot.r)
                    whole_quad<X>(out, B, ldb);
                else
                    part_quad<X>(out, B, ldb, width, slot.r - r);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const auto* h = h_row(i);
                F sum = start(n, width);
                for (int64_t c = 0; c < count; ++c)
                    sum = Packets<X>::step(sum, scratch[c], h + c * Packets<X>::PER);
                finish(i, n, width, sum);
            }
        }
    }

    void run() const {
        int64_t done = 0;
        if (slot.r == QUAD<X>) done = in_registers<1, 2>();
        if (slot.r == 2 * QUAD<X>) done = W == 16 ? in_registers<2, 2>() : in_registers<2, 1>();
        if (slot.r == 4 * QUAD<X> && W == 16) done = in_registers<4, 1>();
        in_memory(done);
    }
};

// Vectors of scratch for ranks up to R.
template <class X>
constexpr int64_t panel_size(int64_t R) {
    return quads<X>(R) * 4;
}

}  // namespace fastlora::FL_ISA
