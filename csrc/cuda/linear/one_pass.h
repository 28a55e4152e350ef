// y = x w + factor * (h b + lora_bias) + bias and h = x a, for few rows in one launch.
//
// h is summed beside x w in the same K loop, in every block anew: R K numbers more through L2 a
// block, no second launch and no wait between. Then each warp takes 8 of the block's 32 columns.
#pragma once

#include "cuda/linear/stream.h"

namespace fastlora {

template <class T, Layout BY, int BM, int RANKS, int STAGES>
struct OnePass {
    static constexpr int BN = 32;
    using Columns = Stream<T, BY, BM, BN, RANKS, STAGES>;
    static constexpr int THREADS = Columns::THREADS;
    static constexpr int NARROW = BM * RANKS / 8;  // chunks of h
    static constexpr int SHARED = Columns::SHARED + NARROW * 16;

    FL_DEVICE static void run(const Linear<T>& p) {
        Chunk* memory = reinterpret_cast<Chunk*>(shared_memory());
        Chunk* narrow = memory + Columns::SHARED / 16;
        const int64_t row = int64_t(block(1)) * BM, column = int64_t(block(0)) * BN;
        const T* p_a = static_cast<const T*>(p.a.p);
        const Matrix<T> a =
            BY == BY_N ? Matrix<T>{p_a, p.a.ld, p.R, p.K} : Matrix<T>{p_a, p.a.ld, p.K, p.R};
        const float* sums = Columns::run(memory, p.x, p.w, a, row, column, p.R, [] {});

        // h as the first factor of tensor cores wants it, rounded; one block of a row keeps it.
        uint32_t* words = reinterpret_cast<uint32_t*>(narrow);
        for (int i = thread(); i < BM * RANKS / 2; i += THREADS) {
            const int m = i / (RANKS / 2), r = i % (RANKS / 2) * 2;
            const float* own = sums + m * Columns::COLUMNS + BN + r;
            // Sums beyond R were never taken.
            const uint32_t both = r < p.R ? pair<T>(own[0], own[1]) : 0;
            words[place<RANKS / 8>(m, r / 8) * 4 + r % 8 / 2] = both;
            if (block(0) == 0 && row + m < p.M && r < p.R)
                *reinterpret_cast<uint32_t*>(p.h + (row + m) * p.R + r) = both;
        }
        sync_block();

        const int n = warp() * 8, g = lane() / 4, q = lane() % 4 * 2;
        float delta[BM / 16][4] = {};
        for (int r = 0; r < p.R; r += 16) {
            uint32_t b_b[2];  // [16, 8]
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b_b[i] = factor_pair<T, BY>(p.b, column + n + g, r + 8 * i + q, p.N, p.R);
#pragma unroll
            for (int m = 0; m < BM / 16; ++m) {
                uint32_t b_h[4];  // [16, 16]
                first_fragment<RANKS / 8>(b_h, narrow, 16 * m, r);
                multiply<is_bf16<T>>(delta[m], b_h, b_b[0], b_b[1]);
            }
        }
        const float first = biases(p, column + n + q), second = biases(p, column + n + q + 1);
#pragma unroll
        for (int m = 0; m < BM / 16; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int own = 16 * m + g + 8 * i;
                if (row + own >= p.M || column + n + q >= p.N) continue;
                const float* sum = sums + own * Columns::COLUMNS + n + q;
                *reinterpret_cast<uint32_t*>(p.y + (row + own) * p.ldy + column + n + q) =
                    pair<T>(fused(p.factor, delta[m][2 * i], sum[0]) + first,
                            fused(p.factor, delta[m][2 * i + 1], sum[1]) + second);
            }
    }
};

template <class S, class T>
FL_KERNEL(S::THREADS, 1) one_pass(FL_PARAMETERS Linear<T> p) {
    S::run(p);
}

}  // namespace fastlora
