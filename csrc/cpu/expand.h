// sum[n] = start[n] + sum over ranks of h[r] * B[n, r] for W neighbouring outputs at a time.
//
// B is read as stored: W of its rows, four ranks' worth of 32-bit units each, are transposed in
// registers into columns of W outputs. Ranks are summed in their order for every row alike.
#pragma once

#include <algorithm>

#include "kinds.h"

namespace fastlora::FL_ISA {

// Ranks that one transposition takes.
template <class X>
constexpr int QUAD = 4 * Kind<X>::PER;

template <class X>
constexpr int64_t quads(int64_t r) {
    return (r + QUAD<X> - 1) / QUAD<X>;
}

// Columns of W rows of B from row 0 on, `rows` of them real: out [quads(r) * 4].
template <class X, class T>
inline void panel(F* out, const T* B, int64_t ldb, int64_t rows, int64_t r) {
    for (int64_t first = 0; first < r; first += QUAD<X>, out += 4) {
        Q q[W];
        for (int n = 0; n < W; ++n) {
            const T* row = B + std::min<int64_t>(n, rows - 1) * ldb + first;
            if (first + QUAD<X> <= r) {
                q[n] = Kind<X>::quad(row);
            } else {
                // What lies past the rank is not this slot's.
                T padded[QUAD<X>] = {};
                std::memcpy(padded, row, (r - first) * sizeof(T));
                q[n] = Kind<X>::quad(padded);
            }
        }
        columns(out, q);
    }
}

// Of one slot: how many ranks count, its B (null without ranks), and lora_bias (or null).
template <class T>
struct Slot {
    int64_t r;
    const T *A, *B;
    const float* bias;
};

// finish(i, v, sum) for rows i of h and vectors v of outputs; COUNT panels of QUADS quads stay in
// registers while the rows pass by.
template <class X, int QUADS, int COUNT, class Row, class Finish>
inline void expand_rows(const F* columns, const F* start, int64_t rows, Row h_row, Finish finish) {
    F column[COUNT][QUADS * 4];
    for (int v = 0; v < COUNT; ++v)
        for (int c = 0; c < QUADS * 4; ++c) column[v][c] = columns[v * QUADS * 4 + c];
    for (int64_t i = 0; i < rows; ++i) {
        const auto* h = h_row(i);
        F sum[COUNT];
        for (int v = 0; v < COUNT; ++v) sum[v] = start[v];
        for (int c = 0; c < QUADS * 4; ++c)
            for (int v = 0; v < COUNT; ++v)
                sum[v] = Kind<X>::step(sum[v], column[v][c], h + c * Kind<X>::PER);
        for (int v = 0; v < COUNT; ++v) finish(i, v, sum[v]);
    }
}

template <class X, class Row, class Finish>
inline void expand_rows(const F* columns, int64_t count, const F* start, int64_t rows, Row h_row,
                        Finish finish) {
    for (int64_t i = 0; i < rows; ++i) {
        const auto* h = h_row(i);
        F sum = start[0];
        for (int64_t c = 0; c < count; ++c)
            sum = Kind<X>::step(sum, columns[c], h + c * Kind<X>::PER);
        finish(i, 0, sum);
    }
}

// Vectors that expand() keeps panels in.
template <class X>
constexpr int64_t panels_size(int64_t R) {
    return 2 + 2 * 4 * quads<X>(R);
}

// finish(i, n, count, sum) for every row i and the outputs n ... n + count - 1 of [0, N).
template <class X, class T, class Row, class Finish>
inline void expand(F* scratch, const Slot<T>& slot, const T* next, int64_t ldb,
                   int64_t N, int64_t rows, Row h_row, Finish finish) {
    const int64_t q = quads<X>(slot.r);
    F *start = scratch, *columns = scratch + 2;
    const int wide = q == 1 || q == 2 ? 2 : 1;
    for (int64_t n = 0; n < N; n += wide * W) {
        const int vectors = n + W < N ? wide : 1;
        for (int v = 0; v < vectors; ++v) {
            const int64_t from = n + v * W, real = std::min<int64_t>(W, N - from);
            if (next)
                for (int64_t i = 0; i < real; ++i) __builtin_prefetch(next + (from + i) * ldb, 0, 2);
            panel<X, T>(columns + v * 4 * q, slot.B + from * ldb, ldb, real, slot.r);
            start[v] = slot.bias ? load_some(slot.bias + from, real) : zero();
        }
        const auto done = [&](int64_t i, int v, F sum) {
            finish(i, n + v * W, std::min<int64_t>(W, N - n - v * W), sum);
        };
        if (q == 1 && vectors == 2)
            expand_rows<X, 1, 2>(columns, start, rows, h_row, done);
        else if (q == 2 && vectors == 2)
            expand_rows<X, 2, 2>(columns, start, rows, h_row, done);
        else if (q == 4)
            expand_rows<X, 4, 1>(columns, start, rows, h_row, done);
        else
            expand_rows<X>(columns, 4 * q, start, rows, h_row, done);
    }
}

}  // namespace fastlora::FL_ISA
