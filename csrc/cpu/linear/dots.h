// Dot products of rows of x with rows of a weight, the weight read once, as it is stored.
//
// x is packed beforehand: STEP elements of each of MB rows lie side by side, so that its rows'
// distance (a power of two, as a rule) does not put them all into one set of a cache. One
// accumulator a product, whatever the tile: a product's bits do not depend on its neighbours.
#pragma once

#include <algorithm>

#include "cpu/linear/packets.h"

namespace fastlora::FL_ISA {

// Rows of the weight a tile; rows of x a tile: as many as registers allow.
constexpr int NB = 4;
constexpr int MB = W == 16 ? 4 : 2;

template <class X>
constexpr int64_t packed_size(int64_t K) {
    return (K + Packets<X>::STEP - 1) / Packets<X>::STEP * Packets<X>::STEP * MB;
}

// out [K / STEP, MB, STEP], zeros past K: row i is row(i).
template <class X, class Row>
inline void pack(X* out, int64_t rows, Row row, int64_t K) {
    constexpr int64_t step = Packets<X>::STEP;
    for (int64_t i = 0; i < rows; ++i) {
        const X* from = row(i);
        X* to = out + i * step;
        const int64_t whole = K / step * step;
        for (int64_t k = 0; k < whole; k += step, to += MB * step)
            std::memcpy(to, from + k, step * sizeof(X));
        if (whole < K) {
            std::memset(to, 0, step * sizeof(X));
            std::memcpy(to, from + whole, (K - whole) * sizeof(X));
        }
    }
}

template <class T, int BYTES>
inline void prefetch(const T* p) {
    for (int b = 0; b < BYTES; b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + b, 0, 2);
}

// out[m][n] = x[m] . w[n], x packed. Meanwhile FETCHED rows from next[0] on come closer: hardware
// alone fetches a third less.
template <class X, class T, int ROWS, int COLUMNS, int FETCHED>
inline void dot_tile(float* out, const X* x, const T* const* w, const T* const* next, int64_t K) {
    using packets = Packets<X>;
    constexpr int step = packets::STEP;
    F sum[ROWS][COLUMNS];
    for (auto& row : sum)
        for (F& s : row) s = zero();
    int64_t k = 0;
    for (; k + step <= K; k += step, x += MB * step) {
        for (int n = 0; n < FETCHED; ++n) prefetch<T, int(sizeof(T)) * step>(next[n] + k);
        typename packets::Packet b[COLUMNS];
        for (int n = 0; n < COLUMNS; ++n) b[n] = packets::packet(w[n] + k);
        for (int m = 0; m < ROWS; ++m) {
            const auto a = packets::packet(x + m * step);
            for (int n = 0; n < COLUMNS; ++n) sum[m][n] = packets::dot(sum[m][n], a, b[n]);
        }
    }
    if (k < K) {
        for (int n = 0; n < COLUMNS; ++n) {
            T padded[step] = {};
            std::memcpy(padded, w[n] + k, (K - k) * sizeof(T));
            const auto b = packets::packet(padded);
            for (int m = 0; m < ROWS; ++m)
                sum[m][n] = packets::dot(sum[m][n], packets::packet(x + m * step), b);
        }
    }
    for (int m = 0; m < ROWS; ++m)
        for (int n = 0; n < COLUMNS; n += 4)
            sums(out + m * COLUMNS + n, sum[m][n], sum[m][n + 1], sum[m][n + 2], sum[m][n + 3]);
}

// The tile for as many rows that fetches as many of the next: 0, 1, 2 or all.
template <class X, class T, int COLUMNS>
inline auto tile_for(int rows, int fetched) {
    if (rows == 1)
        return fetched ? dot_tile<X, T, 1, COLUMNS, COLUMNS> : dot_tile<X, T, 1, COLUMNS, 0>;
    if constexpr (COLUMNS == NB) {
        if (rows == MB && MB == 4 && fetched == 1) return dot_tile<X, T, MB, NB, 1>;
        if (rows == MB && MB == 4 && fetched == 2) return dot_tile<X, T, MB, NB, 2>;
        if (rows == 3 && MB == 4)
            return fetched ? dot_tile<X, T, 3, NB, NB> : dot_tile<X, T, 3, NB, 0>;
        if (rows == MB) return fetched ? dot_tile<X, T, MB, NB, NB> : dot_tile<X, T, MB, NB, 0>;
    }
    return fetched ? dot_tile<X, T, 2, COLUMNS, COLUMNS> : dot_tile<X, T, 2, COLUMNS, 0>;
}

template <class X, class T, int COLUMNS, class WRow, class After, class Emit>
inline void dots_by(const X* x, int64_t first, int64_t rows, int64_t columns, WRow w_row,
                    After after, int64_t K, Emit emit) {
    const int64_t blocks = (first + rows + MB - 1) / MB;
    // Among the first blocks of x, so that each step of a tile fetches little.
    const int fetched = MB < NB || blocks < 2 ? COLUMNS : blocks < 4 ? 2 : 1;
    const T *w[COLUMNS], *next[COLUMNS];
    for (int64_t n = 0; n < columns; n += COLUMNS) {
        const int64_t ns = std::min<int64_t>(COLUMNS, columns - n);
        for (int i = 0; i < COLUMNS; ++i) {
            // Past the end the last one again: its products are not emitted.
            w[i] = w_row(n + std::min<int64_t>(i, ns - 1));
            const int64_t coming = n + COLUMNS + i;
            const T* later = coming < columns ? nullptr : after(coming - columns);
            next[i] = coming < columns ? w_row(coming) : later ? later : w[i];
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t from = block ? 0 : first;
            const int64_t to = std::min<int64_t>(MB, first + rows - block * MB);
            const bool fetching = block * fetched < COLUMNS && (to - from == MB || blocks == 1);
            float out[MB * COLUMNS];
            tile_for<X, T, COLUMNS>(int(to - from), fetching ? fetched : 0)(
                out, x + block * packed_size<X>(K) + from * Packets<X>::STEP, w,
                next + (fetching ? block * fetched : 0), K);
            for (int64_t i = from; i < to; ++i)
                emit(block * MB + i, n, out + (i - from) * COLUMNS, ns);
        }
    }
}

// emit(m, n, products, count) of products n ... n + count - 1 for rows m of packed x, in `blocks`
// of MB (first and rows say which of the one block, or every row of several), and `columns` rows
// of w. after(i) are the rows that are read next, or null.
template <class X, class T, class WRow, class After, class Emit>
inline void dots(const X* x, int64_t first, int64_t rows, int64_t columns, WRow w_row, After after,
                 int64_t K, Emit emit) {
    // One row alone has registers to spare: more of the weight is under way.
    if (rows == 1)
        dots_by<X, T, 2 * NB>(x, first, rows, columns, w_row, after, K, emit);
    else
        dots_by<X, T, NB>(x, first, rows, columns, w_row, after, K, emit);
}

}  // namespace fastlora::FL_ISA
