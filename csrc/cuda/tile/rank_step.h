// The rank step: acc += h b, for sums that lie as tensor cores leave them.
//
// h (M, R) and b (R, N) are so narrow that their fragments come straight from global memory: no
// stage of shared memory, any rank, float32 adapters beside half-precision sums. A tile of BM x BN
// reads BM R + BN R numbers, from L2 for all but the first.
#pragma once

#include "cuda/tile/tile.h"

namespace fastlora {

// The second factor of the rank step, of T or of float32.
struct Factor {
    const void* p;
    int64_t ld;
    bool single;  // float32
};

// b at (k, n) and (k + 1, n), as T; zeros beyond N and R.
template <class T, Layout BY>
FL_DEVICE uint32_t factor_pair(const Factor& b, int64_t n, int k, int64_t N, int R) {
    if (n >= N || k >= R) return 0;
    const int64_t at = BY == BY_N ? n * b.ld + k : k * b.ld + n;
    const int64_t next = BY == BY_N ? 1 : b.ld;
    if (BY == BY_N && !b.single)
        return *reinterpret_cast<const uint32_t*>(static_cast<const T*>(b.p) + at);
    if (b.single) {
        const float* p = static_cast<const float*>(b.p) + at;
        return pair<T>(p[0], p[next]);
    }
    const T* p = static_cast<const T*>(b.p) + at;
    return p[0].raw | uint32_t(p[next].raw) << 16;
}

// Rows of h (M, R), contiguous: the pair at (row, k).
template <class T>
FL_DEVICE uint32_t h_pair(const T* h, int64_t row, int k, int64_t M, int R) {
    if (row >= M || k >= R) return 0;
    return *reinterpret_cast<const uint32_t*>(h + row * R + k);
}

// acc [16 MT, 8 NT] of a warp, whose first element is (row, column).
template <class T, Layout BY, int MT, int NT>
FL_DEVICE void rank_step(float (&acc)[MT][NT][4], const T* h, const Factor& b, int64_t row,
                         int64_t column, int64_t M, int64_t N, int R) {
    const int g = lane() / 4, q = lane() % 4 * 2;
    for (int r = 0; r < R; r += 16) {
        uint32_t b_b[NT][2];  // [16, 8 NT]
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b_b[n][i] = factor_pair<T, BY>(b, column + 8 * n + g, r + 8 * i + q, N, R);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            uint32_t b_h[4];  // [16, 16]
#pragma unroll
            for (int i = 0; i < 4; ++i)
                b_h[i] = h_pair(h, row + 16 * m + g + 8 * (i & 1), r + 8 * (i >> 1) + q, M, R);
#pragma unroll
            for (int n = 0; n < NT; ++n) multiply<is_bf16<T>>(acc[m][n], b_h, b_b[n][0], b_b[n][1]);
        }
    }
}

}  // namespace fastlora
