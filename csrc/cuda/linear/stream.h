// Sums of few rows: x (M, K) times w's columns and, beside them, an adapter's, in one pass over K.
//
// w streams through once, 16 bytes a load and STAGES - 1 steps of 128 under way; a block has BN of
// its columns and all rows. Of each step a warp takes a quarter of k, so all four have work with
// 16 rows too; their sums are added in the order of the warps. A row's sums have the same bits
// whatever the other rows are, and whatever BM is.
#pragma once

#include "cuda/linear/linear.h"

namespace fastlora {

template <class T, Layout BY, int BM, int BN, int RANKS, int STAGES>
struct Stream {
    static constexpr int WARPS = 4, THREADS = 32 * WARPS, DEPTH = 128, COLUMNS = BN + RANKS;
    static constexpr int X = BM * DEPTH / 8, W = BN * DEPTH / 8, A = RANKS * DEPTH / 8;  // chunks
    static constexpr int STAGE = X + W + A;
    static constexpr int PIPELINE = STAGES * STAGE * 16, SUMS = WARPS * BM * COLUMNS * 4;  // bytes
    static constexpr int SHARED = PIPELINE > SUMS ? PIPELINE : SUMS;

    using Sums = float[BM / 16][COLUMNS / 8][4];

    FL_DEVICE static void load(Chunk* stage, const Matrix<T>& x, const Matrix<T>& w,
                               const Matrix<T>& a, int64_t row, int64_t column, int64_t k,
                               int ranks) {
        load_tile<BM, DEPTH / 8, THREADS>(stage, x, row, k);
        load_factor<BY, BN, DEPTH, THREADS>(stage + X, w, column, k);
        if constexpr (RANKS > 0)
            load_factor<BY, RANKS, DEPTH, THREADS>(stage + X + W, a, 0, k, (ranks + 15) / 16 * 16);
    }

    FL_DEVICE static void multiply_stage(Sums& acc, const Chunk* stage, int ranks) {
#pragma unroll
        for (int step = 0; step < DEPTH / 16 / WARPS; ++step) {
            const int k = (warp() * (DEPTH / 16 / WARPS) + step) * 16;
            uint32_t b_x[BM / 16][4];  // [BM, 16]
#pragma unroll
            for (int m = 0; m < BM / 16; ++m) first_fragment<DEPTH / 8>(b_x[m], stage, 16 * m, k);
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 16) {
                uint32_t b_w[4];  // [16, 16]
                if (n < BN) {
                    second_fragment<BY, BN, DEPTH>(b_w, stage + X, n, k);
                } else if constexpr (RANKS > 0) {
                    if (n - BN >= ranks) break;
                    second_fragment<BY, RANKS, DEPTH>(b_w, stage + X + W, n - BN, k);
                }
#pragma unroll
                for (int m = 0; m < BM / 16; ++m) {
                    multiply<is_bf16<T>>(acc[m][n / 8], b_x[m], b_w[0], b_w[1]);
                    multiply<is_bf16<T>>(acc[m][n / 8 + 1], b_x[m], b_w[2], b_w[3]);
                }
            }
        }
    }

    // The sums [BM, COLUMNS] of rows from `row` and columns from `column` on, in shared memory.
    // `besides` asks for copies that come along with the first step's.
    template <class F>
    FL_DEVICE static float* run(Chunk* memory, const Matrix<T>& x, const Matrix<T>& w,
                                const Matrix<T>& a, int64_t row, int64_t column, int ranks,
                                F besides) {
        Sums acc = {};
        const int64_t steps = (x.columns + DEPTH - 1) / DEPTH;
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < steps) load(memory + s * STAGE, x, w, a, row, column, s * DEPTH, ranks);
            copies_commit();
        }
        besides();
        for (int64_t s = 0; s < steps; ++s) {
            copies_wait<STAGES - 2>();
            sync_block();
            const int64_t next = s + STAGES - 1;
            if (next < steps)
                load(memory + next % STAGES * STAGE, x, w, a, row, column, next * DEPTH, ranks);
            copies_commit();
            multiply_stage(acc, memory + s % STAGES * STAGE, ranks);
        }
        copies_commit();
        copies_wait<0>();
        sync_block();
        float* sums = reinterpret_cast<float*>(memory);
        const int g = lane() / 4, q = lane() % 4 * 2;
#pragma unroll
        for (int m = 0; m < BM / 16; ++m)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[(warp() * BM + 16 * m + g + i / 2 * 8) * COLUMNS + 8 * n + q + i % 2] =
                        acc[m][n][i];
        sync_block();
        for (int i = thread(); i < BM * COLUMNS; i += THREADS) {
            float sum = sums[i];
#pragma unroll
            for (int other = 1; other < WARPS; ++other) sum += sums[other * BM * COLUMNS + i];
            sums[i] = sum;
        }
        sync_block();
        return sums;
    }
};

}  // namespace fastlora
