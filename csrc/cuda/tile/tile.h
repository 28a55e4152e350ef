// Tiles in shared memory: how they get there, how they lie, how a warp reads its fragments.
//
// A tile is rows of 16-byte chunks. Chunks of a row change places by the row's number, so that
// neither the 8 rows that a matrix load reads at one chunk nor the chunks of a row share banks.
#pragma once

#include "cuda/tile/numbers.h"

namespace fastlora {

// How the second factor of a product over k lies: side by side are the elements of one n (a weight
// in forward) or those of one k (the same weight in the gradient for x).
enum Layout { BY_N, BY_K };

template <int CHUNKS>
FL_DEVICE int place(int row, int chunk) {
    if constexpr (CHUNKS >= 8) return row * CHUNKS + (chunk ^ (row & 7));
    static_assert(CHUNKS >= 4, "a row of a tile has at least 64 bytes");
    return row * CHUNKS + (chunk ^ (row >> 1 & 3));
}

// A matrix of rows with unit stride, all chunks of which are aligned.
template <class E>
struct Matrix {
    const E* p;
    int64_t ld, rows, columns;
};

// Asks for a tile [ROWS, CHUNKS] from (row, column) on; zeros where the matrix has ended, nothing
// from row `some` of the tile on. A thread's rows are STEP apart, a multiple of the swizzle's
// period: one address, one place and one test of the column serve all of its copies.
template <int ROWS, int CHUNKS, int THREADS, class E>
FL_DEVICE void load_tile(Chunk* to, const Matrix<E>& m, int64_t row, int64_t column,
                         int some = ROWS) {
    constexpr int EACH = 16 / sizeof(E), STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0 && STEP % 8 == 0);
    const int r = thread() / CHUNKS, c = thread() % CHUNKS;
    const int64_t left = m.rows - row - r;
    const bool inside = column + c * EACH < m.columns;
    const E* from = m.p + (row + r) * m.ld + column + c * EACH;
    Chunk* own = to + place<CHUNKS>(r, c);
#pragma unroll
    for (int j = 0; j < ROWS / STEP; ++j) {
        if (r + j * STEP >= some) break;
        const bool there = inside && j * STEP < left;
        copy_async(own + j * STEP * CHUNKS, there ? from + j * STEP * m.ld : m.p, there);
    }
}

// Asks for n in [n, n + COLUMNS), `some` of them at least, and k in [k, k + DEPTH) of a second
// factor.
template <Layout BY, int COLUMNS, int DEPTH, int THREADS, class E>
FL_DEVICE void load_factor(Chunk* to, const Matrix<E>& m, int64_t n, int64_t k,
                           int some = COLUMNS) {
    constexpr int EACH = 16 / sizeof(E);
    if constexpr (BY == BY_N)
        load_tile<COLUMNS, DEPTH / EACH, THREADS>(to, m, n, k, some);
    else
        load_tile<DEPTH, COLUMNS / EACH, THREADS>(to, m, k, n);
}

// Rows m ... m + 15 and k ... k + 15 of a tile, as the first factor of mma.m16n8k16.
template <int CHUNKS>
FL_DEVICE void first_fragment(uint32_t (&a)[4], const Chunk* tile, int m, int k) {
    const int j = lane() / 8, i = lane() % 8;
    load_matrices(a, tile + place<CHUNKS>(m + i + 8 * (j & 1), k / 8 + (j >> 1)));
}

// n ... n + 15 and k ... k + 15 as the second one: b[0], b[1] are of the first 8 n.
template <Layout BY, int COLUMNS, int DEPTH>
FL_DEVICE void second_fragment(uint32_t (&b)[4], const Chunk* tile, int n, int k) {
    const int j = lane() / 8, i = lane() % 8;
    if constexpr (BY == BY_N)
        load_matrices(b, tile + place<DEPTH / 8>(n + i + 8 * (j >> 1), k / 8 + (j & 1)));
    else
        load_transposed(b, tile + place<COLUMNS / 8>(k + i + 8 * (j & 1), n / 8 + (j >> 1)));
}

// The same of a float32 tile, each number rounded to T.
template <class T, Layout BY, int COLUMNS, int DEPTH>
FL_DEVICE void narrowed_fragment(uint32_t (&b)[4], const Chunk* tile, int n, int k) {
    const float* p = reinterpret_cast<const float*>(tile);
    const auto at = [&](int n, int k) {
        const int row = BY == BY_N ? n : k, column = BY == BY_N ? k : n;
        constexpr int CHUNKS = (BY == BY_N ? DEPTH : COLUMNS) / 4;
        return p[place<CHUNKS>(row, column / 4) * 4 + column % 4];
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int own_n = n + 8 * (i / 2) + lane() / 4, own_k = k + 8 * (i % 2) + lane() % 4 * 2;
        b[i] = pair<T>(at(own_n, own_k), at(own_n, own_k + 1));
    }
}

}  // namespace fastlora
