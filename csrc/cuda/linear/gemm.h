// y = x w + factor * keep * (h b) + biases, for many rows: the base product with h from a shrink.
//
// A block has one tile of BM x BN and all of K, in steps of 64 through STAGES of shared memory
// (cp.async, ldmatrix, mma.m16n8k16). The rank step comes last, so that the shrink can run beside
// the K loop; or first, where its sums are masked or a scaled h could overflow (float16). Moves
// e (M K + K N + M N) bytes at least, a tile's x and w come through L2. 2 M N (K + R) flops.
#pragma once

#include "cuda/linear/linear.h"

namespace fastlora {

constexpr int GEMM_DEPTH = 64;

template <class T, Layout BY, int BM, int BN, int WM, int WN, int STAGES>
struct Gemm {
    static constexpr int THREADS = BM / WM * (BN / WN) * 32;
    static constexpr int X = BM * GEMM_DEPTH / 8, W = BN * GEMM_DEPTH / 8;  // chunks
    static constexpr int SHARED = STAGES * (X + W) * 16;

    // What a warp has summed of its WM x WN.
    using Sums = float[WM / 16][WN / 8][4];

    FL_DEVICE static void load(Chunk* stage, const Linear<T>& p, const Place& tile, int64_t k) {
        load_tile<BM, GEMM_DEPTH / 8, THREADS>(stage, p.x, tile.row, k);
        load_factor<BY, BN, GEMM_DEPTH, THREADS>(stage + X, p.w, tile.column, k);
    }

    FL_DEVICE static void multiply_stage(Sums& acc, const Chunk* stage, int row, int column) {
#pragma unroll
        for (int k = 0; k < GEMM_DEPTH; k += 16) {
            uint32_t b_x[WM / 16][4];  // [WM, 16]
#pragma unroll
            for (int m = 0; m < WM / 16; ++m)
                first_fragment<GEMM_DEPTH / 8>(b_x[m], stage, row + 16 * m, k);
#pragma unroll
            for (int n = 0; n < WN / 16; ++n) {
                uint32_t b_w[4];  // [16, 16]
                second_fragment<BY, BN, GEMM_DEPTH>(b_w, stage + X, column + 16 * n, k);
#pragma unroll
                for (int m = 0; m < WM / 16; ++m) {
                    multiply<is_bf16<T>>(acc[m][2 * n], b_x[m], b_w[0], b_w[1]);
                    multiply<is_bf16<T>>(acc[m][2 * n + 1], b_x[m], b_w[2], b_w[3]);
                }
            }
        }
    }

    FL_DEVICE static void run(const Linear<T>& p) {
        Chunk* memory = reinterpret_cast<Chunk*>(shared_memory());
        const Place tile = place_of<BM, BN>(block(), p.M, p.N);
        const int row = warp() / (BN / WN) * WM, column = warp() % (BN / WN) * WN;
        Sums acc = {};
        const int64_t steps = (p.K + GEMM_DEPTH - 1) / GEMM_DEPTH;
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < steps) load(memory + s * (X + W), p, tile, s * GEMM_DEPTH);
            copies_commit();
        }
        if (!p.scaled) {
            wait_for_previous();
            rank_step<T, BY>(acc, p.h, p.b, tile.row + row, tile.column + column, p.M, p.N, p.R);
            scale_first(acc, p, tile.row + row, tile.column + column);
        }
        for (int64_t s = 0; s < steps; ++s) {
            copies_wait<STAGES - 2>();
            sync_block();
            const int64_t next = s + STAGES - 1;
            if (next < steps) load(memory + next % STAGES * (X + W), p, tile, next * GEMM_DEPTH);
            copies_commit();
            multiply_stage(acc, memory + s % STAGES * (X + W), row, column);
        }
        if (p.scaled) {
            wait_for_previous();
            rank_step<T, BY>(acc, p.scaled, p.b, tile.row + row, tile.column + column, p.M, p.N,
                             p.R);
        }
        sync_block();
        store<T, BM, BN, THREADS>(acc, memory, p, tile, row, column);
    }
};

template <class G, class T>
FL_KERNEL(G::THREADS, 1) gemm(FL_PARAMETERS Linear<T> p) {
    G::run(p);
}

}  // namespace fastlora
