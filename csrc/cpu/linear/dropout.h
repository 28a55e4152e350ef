// out = scale * keep * x, or out += it; keep, to the bit, as in fastlora/backends/dropout.py.
//
// Reads x, writes out; the mask is made from (seed, row, column) in registers and never stored.
// Philox4x32-7 (Salmon et al. 2011): key = seed, counter = (column / 8, row, 0, 0); eight 16-bit
// lanes a counter, one a column.
#pragma once

#include <algorithm>

#include "cpu/simd/simd.h"
#include "cpu/threads.h"

namespace fastlora::FL_ISA {

// Counters at a time: enough for the widest vectors. Columns they decide on.
constexpr int COUNTERS = 16, DECIDED = 8 * COUNTERS;

// lanes[8 j ... 8 j + 7] are counter (first + j, row)'s.
inline void philox(uint16_t lanes[DECIDED], uint32_t first, uint32_t row, uint64_t seed) {
    uint32_t words[4][COUNTERS];
    for (int j = 0; j < COUNTERS; ++j) {
        uint32_t c0 = first + j, c1 = row, c2 = 0, c3 = 0;
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < 7; ++round) {
            const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
            c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
            c1 = uint32_t(p1);
            c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
            c3 = uint32_t(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[0][j] = c0;
        words[1][j] = c1;
        words[2][j] = c2;
        words[3][j] = c3;
    }
    for (int j = 0; j < COUNTERS; ++j)
        for (int i = 0; i < 4; ++i) {
            lanes[8 * j + 2 * i] = uint16_t(words[i][j]);
            lanes[8 * j + 2 * i + 1] = uint16_t(words[i][j] >> 16);
        }
}

template <class X>
void dropout(X* out, int64_t ldo, const X* x, int64_t ldx, int64_t M, int64_t K, int64_t first_row,
             uint64_t seed, uint32_t threshold, float scale, bool add, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < M; ++m) {
        uint16_t lanes[DECIDED];
        float factor[DECIDED];
        for (int64_t k = 0; k < K; k += DECIDED) {
            philox(lanes, uint32_t(k / 8), uint32_t(first_row + m), seed);
            for (int i = 0; i < DECIDED; ++i) factor[i] = lanes[i] >= threshold ? scale : 0.0f;
            const int64_t count = std::min<int64_t>(DECIDED, K - k);
            for (int64_t i = 0; i < count; i += W) {
                const int64_t width = std::min<int64_t>(W, count - i);
                const X* from = x + m * ldx + k + i;
                X* to = out + m * ldo + k + i;
                const F before = add ? load_some(to, width) : zero();
                store_some(to, width, fma(load_some(from, width), load(factor + i), before));
            }
        }
    }
}

}  // namespace fastlora::FL_ISA
