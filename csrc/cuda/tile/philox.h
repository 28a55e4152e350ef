// The dropout mask of fastlora/backends/dropout.py, bit for bit, for the fragments of tensor cores.
//
// Philox4x32-7 (Salmon et al. 2011): key = seed, counter = (column / 8, row, 0, 0); eight 16-bit
// lanes a counter, one a column.
#pragma once

#include "cuda/tile/numbers.h"

namespace fastlora {

struct Dropout {
    const int64_t* seed;  // null: nothing is dropped
    uint32_t threshold;   // lanes below it are
    float scale;          // of what is kept
};

FL_DEVICE void philox(uint32_t (&words)[4], uint32_t column_group, uint32_t row, uint64_t seed) {
    uint32_t c0 = column_group, c1 = row, c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

FL_DEVICE uint32_t pick(const uint32_t (&of)[4], int i) {
    const uint32_t low = i & 1 ? of[1] : of[0], high = i & 1 ? of[3] : of[2];
    return i & 2 ? high : low;
}

// Two lanes each of four 8 x 8 parts of a 16 x 16 tile from (row, column) on, where this thread has
// columns 2 q and 2 q + 1 of rows g and g + 8: parts 0, 1 are rows g, g + 8 of the left half, 2, 3
// of the right one. Each thread of four computes one counter, then they exchange words.
FL_DEVICE void keep_lanes(uint32_t (&lanes)[4], uint32_t row, uint32_t column, uint64_t seed) {
    const int g = lane() / 4, q = lane() % 4;
    uint32_t words[4], got[4];
    philox(words, column / 8 + q / 2, row + g + 8 * (q & 1), seed);
    got[0] = pick(words, q);
#pragma unroll
    for (int x = 1; x < 4; ++x) got[x] = shuffle_xor(pick(words, q ^ x), x);
#pragma unroll
    for (int j = 0; j < 4; ++j) lanes[j] = pick(got, j ^ q);
}

FL_DEVICE bool kept(uint32_t lanes, int i, uint32_t threshold) {
    return (i ? lanes >> 16 : lanes & 0xFFFF) >= threshold;
}

// A pair of halves without those that are dropped.
FL_DEVICE uint32_t keep_pair(uint32_t values, uint32_t lanes, uint32_t threshold) {
    const uint32_t low = kept(lanes, 0, threshold) ? 0xFFFFu : 0u;
    const uint32_t high = kept(lanes, 1, threshold) ? 0xFFFF0000u : 0u;
    return values & (low | high);
}

}  // namespace fastlora
