// h = dropout(x) a, the narrow half: x (M, K), a (K, R), h (M, R), and factor * h beside it.
//
// A block has 64 rows and 64 ranks, a warp 16 of the rows; K passes in steps of 64 through three
// stages. Float32 adapters become T as they are read. Moves e (M K + R K + M R) bytes: bound by
// reading x, which ranks beyond 64 read again.
#pragma once

#include "cuda/linear/linear.h"

namespace fastlora {

template <class T, class E, Layout BY>
struct Shrink {
    static constexpr int BM = 64, BR = 64, DEPTH = 64, STAGES = 3, THREADS = BM / 16 * 32;
    static constexpr int X = BM * DEPTH / 8, A = BR * DEPTH * sizeof(E) / 16;  // chunks
    static constexpr int SHARED = STAGES * (X + A) * 16;

    FL_DEVICE static void load(Chunk* stage, const Linear<T>& p, int64_t row, int rank, int64_t k) {
        const E* a = static_cast<const E*>(p.a.p);
        const Matrix<E> m =
            BY == BY_N ? Matrix<E>{a, p.a.ld, p.R, p.K} : Matrix<E>{a, p.a.ld, p.K, p.R};
        load_tile<BM, DEPTH / 8, THREADS>(stage, p.x, row, k);
        load_factor<BY, BR, DEPTH, THREADS>(stage + X, m, rank, k);
    }

    FL_DEVICE static void run(const Linear<T>& p) {
        dependents_may_begin();
        Chunk* memory = reinterpret_cast<Chunk*>(shared_memory());
        const int64_t row = int64_t(block(0)) * BM + warp() * 16;
        const int rank = block(1) * BR, g = lane() / 4, q = lane() % 4 * 2;
        const uint64_t seed = p.drop.seed ? uint64_t(*p.drop.seed) : 0;
        float acc[BR / 8][4] = {};
        const int64_t steps = (p.K + DEPTH - 1) / DEPTH;
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < steps) load(memory + s * (X + A), p, int64_t(block(0)) * BM, rank, s * DEPTH);
            copies_commit();
        }
        for (int64_t s = 0; s < steps; ++s) {
            copies_wait<STAGES - 2>();
            sync_block();
            const int64_t next = s + STAGES - 1;
            if (next < steps)
                load(memory + next % STAGES * (X + A), p, int64_t(block(0)) * BM, rank,
                     next * DEPTH);
            copies_commit();
            const Chunk* stage = memory + s % STAGES * (X + A);
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16) {
                uint32_t b_x[4];  // [16, 16]
                first_fragment<DEPTH / 8>(b_x, stage, warp() * 16, k);
                if (p.drop.seed) {
                    uint32_t lanes[4];
                    keep_lanes(lanes, uint32_t(row), uint32_t(s * DEPTH + k), seed);
                    for (int i = 0; i < 4; ++i)
                        b_x[i] = keep_pair(b_x[i], lanes[i], p.drop.threshold);
                }
#pragma unroll
                for (int n = 0; n < BR; n += 16) {
                    if (rank + n >= p.R) break;
                    uint32_t b_a[4];  // [16, 16]
                    if constexpr (sizeof(E) == 4)
                        narrowed_fragment<T, BY, BR, DEPTH>(b_a, stage + X, n, k);
                    else
                        second_fragment<BY, BR, DEPTH>(b_a, stage + X, n, k);
                    multiply<is_bf16<T>>(acc[n / 8], b_x, b_a[0], b_a[1]);
                    multiply<is_bf16<T>>(acc[n / 8 + 1], b_x, b_a[2], b_a[3]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < BR / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t m = row + g + 8 * i;
                const int r = rank + 8 * n + q;
                if (m >= p.M || r >= p.R) continue;
                const float low = acc[n][2 * i] * p.drop.scale;
                const float high = acc[n][2 * i + 1] * p.drop.scale;
                *reinterpret_cast<uint32_t*>(p.h + m * p.R + r) = pair<T>(low, high);
                if (p.scaled)
                    *reinterpret_cast<uint32_t*>(p.scaled + m * p.R + r) =
                        pair<T>(p.factor * low, p.factor * high);
            }
    }
};

template <class S, class T>
FL_KERNEL(S::THREADS, 1) shrink(FL_PARAMETERS Linear<T> p) {
    S::run(p);
}

}  // namespace fastlora
