// What the kernels of one adapter share: their operands, which block has which tile, and how sums
// become y.
#pragma once

#include "cuda/tile/philox.h"
#include "cuda/tile/rank_step.h"

namespace fastlora {

// y (M, N) = x w + factor * keep * (h b + lora_bias) + bias, h (M, R) = dropout(x) a. w (K, N), a
// (K, R) and b (R, N) lie BY_N where n (of a: r) has a row in memory, BY_K where k (of b: r) has.
template <class T>
struct Linear {
    Matrix<T> x, w;
    Factor a, b;
    T* y;
    int64_t ldy;
    T* h;       // contiguous
    T* scaled;  // factor * h, or null: then the rank step comes first
    const T* bias;
    const void* lora_bias;  // of b's type
    int64_t M, K, N;
    int R;
    float factor;
    Dropout drop;  // of x's columns in the shrink, of y's in the product
};

// The tile of a block: a few rows of tiles at a time, so that those that run together share x and
// w in L2.
struct Place {
    int64_t row, column;
};

template <int BM, int BN>
FL_DEVICE Place place_of(int64_t index, int64_t M, int64_t N) {
    constexpr int TOGETHER = 8;
    const int64_t high = (M + BM - 1) / BM, wide = (N + BN - 1) / BN;
    const int64_t first = index / (TOGETHER * wide) * TOGETHER;
    const int64_t rows = high - first < TOGETHER ? high - first : TOGETHER;
    const int64_t within = index % (TOGETHER * wide);
    return {(first + within % rows) * BM, within / rows * BN};
}

// bias + factor * lora_bias of a column.
template <class T>
FL_DEVICE float biases(const Linear<T>& p, int64_t n) {
    float sum = 0.0f;
    if (n >= p.N) return sum;
    if (p.bias) sum = number(p.bias[n]);
    if (p.lora_bias) {
        const float own = p.b.single ? static_cast<const float*>(p.lora_bias)[n]
                                     : number(static_cast<const T*>(p.lora_bias)[n]);
        sum = fused(p.factor, own, sum);
    }
    return sum;
}

// After a rank step that came first: acc times the factor, and 0 where dropout drops.
template <class T, int MT, int NT>
FL_DEVICE void scale_first(float (&acc)[MT][NT][4], const Linear<T>& p, int64_t row,
                           int64_t column) {
    static_assert(NT % 2 == 0);
    const uint64_t seed = p.drop.seed ? uint64_t(*p.drop.seed) : 0;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t lanes[4];
            if (p.drop.seed)
                keep_lanes(lanes, uint32_t(row + 16 * m), uint32_t(column + 8 * n), seed);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& sum = acc[m][n + i / 4][i % 4];
                const int part = i / 4 * 2 + i % 4 / 2;
                const bool keeps = !p.drop.seed || kept(lanes[part], i % 2, p.drop.threshold);
                sum = keeps ? sum * (p.factor * p.drop.scale) : 0.0f;
            }
        }
}

// Sums + biases to y, rounded once: through shared memory, so that a row's bytes leave together.
template <class T, int BM, int BN, int THREADS, int MT, int NT>
FL_DEVICE void store(float (&acc)[MT][NT][4], Chunk* memory, const Linear<T>& p, const Place& tile,
                     int warp_row, int warp_column) {
    constexpr int CHUNKS = BN / 8;
    const int g = lane() / 4, q = lane() % 4;
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int column = warp_column + 8 * n;
        const float first = biases(p, tile.column + column + 2 * q);
        const float second = biases(p, tile.column + column + 2 * q + 1);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = warp_row + 16 * m + g + 8 * i;
                words[place<CHUNKS>(row, column / 8) * 4 + q] =
                    pair<T>(acc[m][n][2 * i] + first, acc[m][n][2 * i + 1] + second);
            }
    }
    sync_block();
    for (int i = thread(); i < BM * CHUNKS; i += THREADS) {
        const int64_t row = tile.row + i / CHUNKS, column = tile.column + i % CHUNKS * 8;
        if (row < p.M && column < p.N)
            *reinterpret_cast<Chunk*>(p.y + row * p.ldy + column) =
                memory[place<CHUNKS>(i / CHUNKS, i % CHUNKS)];
    }
}

}  // namespace fastlora
