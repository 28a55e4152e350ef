// W = round(W + d) in place, without a receipt: it cannot be undone.
//
// Reads W twice and writes it once. The first reading finds its largest value: what might become
// infinite is left alone, before anything is stored. The second adds to W what registers hold of d.
#pragma once

#include "cpu/threads.h"
#include "cpu/merge/weight.h"

namespace fastlora::FL_ISA {

inline float largest_finite(float) { return 0x1.fffffep127f; }
inline bf16 largest_finite(bf16) { return {0x7f7f}; }
inline f16 largest_finite(f16) { return {0x7bff}; }

template <class T>
class MergeWithoutReceipt {
  public:
    MergeWithoutReceipt(Weight<T> weight, const Delta& delta, int threads)
        : w(weight), delta(delta), tiles(weight.N, weight.K), threads(threads) {}

    // False, nothing done, where a value might not be finite.
    bool merge() const {
        uint32_t bits = 0;
#pragma omp parallel for schedule(static) num_threads(threads) \
    reduction(max : bits) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) bits = std::max(bits, largest_of(i));
        // Half of the largest number leaves room for every rounding on the way.
        if (!(bit_cast<float>(bits) + delta.bound() < widen(largest_finite(T{})) / 2)) return false;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) {
            const Rounding rounding;
            visit_blocks(tiles, i, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t) {
                if (w.column == 1 && rows == BLOCK_N && count == BLOCK_K)
                    whole_block(n, k);
                else
                    part_block(n, k, rows, count);
                return true;
            });
        }
        return true;
    }

  private:
    Weight<T> w;
    const Delta& delta;
    Tiles tiles;
    int threads;

    void whole_block(int64_t n, int64_t k) const {
        for (int64_t i = 0; i < BLOCK_N; i += Delta::ROWS) {
            T* const at = w.at(n + i, k);
            // Two blocks on: what is near is on its way.
            for (int64_t j = 0; j < Delta::ROWS; ++j)
                prefetch(at + j * w.row + 2 * BLOCK_K, BLOCK_K);
            delta.tile(n + i, k, [&](int64_t j, int64_t v, const F(&d)[Delta::VECTORS]) {
                T* const to = at + j * w.row + v;
                F sum[Delta::VECTORS];
                for (int i = 0; i < Delta::VECTORS; ++i) sum[i] = add(load(to + i * W), d[i]);
                put_finite(to, sum);
            });
        }
    }

    void part_block(int64_t n, int64_t k, int64_t rows, int64_t count) const {
        alignas(64) float d[BLOCK_N][LINE];
        alignas(64) T copy[BLOCK_K], merged[BLOCK_K];
        delta(d, n, k);
        for (int64_t j = 0; j < rows; ++j) {
            const T* before = w.read(copy, n + j, k, count);
            for (int v = 0; v < BLOCK_K; v += W)
                put(merged + v, rounded<T>(add(load(before + v), load(d[j] + v))));
            w.write(merged, n + j, k, count);
        }
    }

    static void prefetch(const T* p, int64_t count) {
        for (int64_t b = 0; b < count * int64_t(sizeof(T)); b += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(p) + b, 1);
    }

    uint32_t largest_of(int64_t tile) const {
        const int64_t top = tiles.top(tile), left = tiles.left(tile);
        const int64_t rows = tiles.rows(tile), count = tiles.columns(tile);
        Exponents seen{};
        int64_t n = 0;
        if (w.column == 1 && rows >= 4) {
            // Four rows apart, each read on end: a core fetches more than of one at a time.
            const int64_t part = rows / 4;
            for (; n < part; ++n)
                for (int64_t k = 0; k < count; k += W)
                    for (int64_t i = 0; i < 4; ++i) {
                        const T* at = w.at(top + n + i * part, left + k);
                        __builtin_prefetch(reinterpret_cast<const char*>(at) + 512, 0, 2);
                        seen = largest(seen, load_some(at, std::min<int64_t>(W, count - k)));
                    }
            n *= 4;
        }
        for (; n < rows; ++n)
            for (int64_t k = 0; k < count; k += BLOCK_K) {
                alignas(64) T copy[BLOCK_K];
                const T* row = w.read(copy, top + n, left + k, std::min(BLOCK_K, count - k));
                for (int v = 0; v < BLOCK_K; v += W) seen = largest(seen, load(row + v));
            }
        return largest(seen);
    }
};

}  // namespace fastlora::FL_ISA
