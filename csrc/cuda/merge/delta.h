// d = sum of scale * B A of a tile, in bits that the same kernel always gives.
//
// Float32; steps in the order of the ranks, no contraction left to the compiler. Half-precision
// factors enter tensor cores as they are; float32 ones are multiplied and added one by one, so that
// those sums have the same bits on every GPU and on the host. A warp has 16 rows of a half of the
// tile; a thread, of rows g and g + 8, 8 columns side by side: 16 bytes of a half-precision weight.
// A tensor core gives it pairs from four products, so the columns of A change places.
#pragma once

#include "cuda/tile/tile.h"

namespace fastlora {

// Rows and columns of a tile, which a block of threads has.
constexpr int TILE_N = 64, TILE_K = 64, MERGE_THREADS = 256;
// Ranks of float32 and of half-precision factors that are in shared memory at a time; a row of
// float32 B with room so that 8 of them share no banks.
constexpr int SINGLE_RANKS = 16, HALF_RANKS = 64, PITCH = SINGLE_RANKS + 4;
constexpr int DELTA_SHARED = (TILE_N * PITCH + SINGLE_RANKS * TILE_K) * 4;
static_assert(DELTA_SHARED >= HALF_RANKS * TILE_K * 2);

// The thread's elements: [row][column].
using Tile = float[2][8];

FL_DEVICE int tile_row(int i) { return warp() / 2 * 16 + lane() / 4 + 8 * i; }
FL_DEVICE int tile_column(int i) { return warp() % 2 * 32 + lane() % 4 * 8 + i; }

// A row of the table of adapters: A, its ld, B, its ld, R.
struct Pair {
    const void *A, *B;
    int64_t lda, ldb;
    int R;
};

FL_DEVICE Pair pair_at(const int64_t* row) {
    return {reinterpret_cast<const void*>(row[0]), reinterpret_cast<const void*>(row[2]), row[1],
            row[3], int(row[4])};
}

FL_DEVICE void add_single(Tile& acc, const Pair& p, int64_t n, int64_t k, int64_t N, int64_t K,
                          float* memory) {
    const float *A = static_cast<const float*>(p.A), *B = static_cast<const float*>(p.B);
    float *b_B = memory, *b_A = memory + TILE_N * PITCH;  // [TILE_N, PITCH], [SINGLE_RANKS, TILE_K]
    for (int first = 0; first < p.R; first += SINGLE_RANKS) {
        const int ranks = p.R - first < SINGLE_RANKS ? p.R - first : SINGLE_RANKS;
        sync_block();
#pragma unroll 2
        for (int i = thread(); i < TILE_N * SINGLE_RANKS; i += MERGE_THREADS) {
            const int row = i / SINGLE_RANKS, r = i % SINGLE_RANKS;
            const bool there = n + row < N && r < ranks;
            b_B[row * PITCH + r] = there ? B[(n + row) * p.ldb + first + r] : 0.0f;
        }
#pragma unroll 2
        for (int i = thread(); i < SINGLE_RANKS * TILE_K; i += MERGE_THREADS) {
            const int r = i / TILE_K, column = i % TILE_K;
            const bool there = k + column < K && r < ranks;
            b_A[i] = there ? A[(first + r) * p.lda + k + column] : 0.0f;
        }
        sync_block();
#pragma unroll 2
        for (int r = 0; r < ranks; ++r) {
            const float b[2] = {b_B[tile_row(0) * PITCH + r], b_B[tile_row(1) * PITCH + r]};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float a = b_A[r * TILE_K + tile_column(i)];
                acc[0][i] = fused(b[0], a, acc[0][i]);
                acc[1][i] = fused(b[1], a, acc[1][i]);
            }
        }
    }
}

template <class T>
FL_DEVICE void add_half(Tile& acc, const Pair& p, int64_t n, int64_t k, int64_t N, int64_t K,
                        Chunk* memory) {
    const T *A = static_cast<const T*>(p.A), *B = static_cast<const T*>(p.B);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);  // [HALF_RANKS, TILE_K], as chunks of 8
    const int q = lane() % 4 * 2;
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = acc[i / 2][j * 2 + i % 2];
    for (int first = 0; first < p.R; first += HALF_RANKS) {
        // Whole steps of 16.
        const int left = (p.R - first + 15) / 16 * 16;
        const int ranks = left < HALF_RANKS ? left : HALF_RANKS;
        sync_block();
        // A pair of columns 8 a + 2 j goes to column 2 a of product j.
#pragma unroll 2
        for (int i = thread(); i < ranks * TILE_K / 2; i += MERGE_THREADS) {
            const int r = i / (TILE_K / 2), column = i % (TILE_K / 2) * 2;
            const int a = column % 32 / 8, j = column % 8 / 2 + column / 32 * 4;
            uint32_t both = 0;
            if (first + r < p.R) {
                const T* from = A + (first + r) * p.lda + k + column;
                if (k + column < K) both = from[0].raw;
                if (k + column + 1 < K) both |= uint32_t(from[1].raw) << 16;
            }
            words[place<TILE_K / 8>(r, j) * 4 + a] = both;
        }
        sync_block();
#pragma unroll 1
        for (int r = 0; r < ranks; r += 16) {
            uint32_t b_B[4];  // [16, 16]
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = n + tile_row(i % 2);
                const int rank = first + r + i / 2 * 8 + q;
                const T* from = B + row * p.ldb + rank;
                b_B[i] = row < N && rank < p.R ? from[0].raw : 0;
                if (row < N && rank + 1 < p.R) b_B[i] |= uint32_t(from[1].raw) << 16;
            }
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                uint32_t b_A[4];  // [16, 16]
                second_fragment<BY_K, TILE_K, HALF_RANKS>(b_A, memory, warp() % 2 * 32 + 8 * j, r);
                multiply<is_bf16<T>>(sums[j], b_B, b_A[0], b_A[1]);
                multiply<is_bf16<T>>(sums[j + 1], b_B, b_A[2], b_A[3]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i / 2][j * 2 + i % 2] = sums[j][i];
}

// d of `count` adapters from number `first` on, for the tile at row n and column k.
FL_DEVICE void delta(Tile& d, const int64_t* adapters, const float* scales, int64_t first,
                     int64_t count, int dtype, int64_t n, int64_t k, int64_t N, int64_t K,
                     Chunk* memory) {
#pragma unroll
    for (int i = 0; i < 16; ++i) d[i / 8][i % 8] = 0.0f;
    for (int64_t adapter = first; adapter < first + count; ++adapter) {
        const Pair p = pair_at(adapters + 5 * adapter);
        Tile acc = {};
        if (dtype == FASTLORA_FLOAT32)
            add_single(acc, p, n, k, N, K, reinterpret_cast<float*>(memory));
        else if (dtype == FASTLORA_BFLOAT16)
            add_half<bf16>(acc, p, n, k, N, K, memory);
        else
            add_half<f16>(acc, p, n, k, N, K, memory);
        const float scale = scales[adapter];
#pragma unroll
        for (int i = 0; i < 16; ++i)
            d[i / 8][i % 8] = fused(scale, acc[i / 8][i % 8], d[i / 8][i % 8]);
    }
    sync_block();
}

}  // namespace fastlora
