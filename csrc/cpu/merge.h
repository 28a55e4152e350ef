// W = round(W + d) in place, d = sum over ranks of B[n, r] A[r, k], and back again, bit for bit.
//
// d is a chain of fused multiply-adds in float32 in the order of the ranks: IEEE 754 fixes every
// bit, whatever the instruction set, compiler or number of threads. Reads and writes W once; A (as
// a strip of 64 columns) stays in a cache. A block of 4 x 64 is computed, checked and noted in the
// receipt before it is stored.
//
// Checksum: words of 8 bytes, a key that follows from the place added to each half, the halves'
// product summed modulo 2^64 (NH, of Black et al., "UMAC: fast and secure message authentication",
// 1999, with keys that are not secret).
#pragma once

#include <atomic>
#include <cmath>

#include "../fastlora.h"
#include "receipt.h"
#include "simd.h"
#include "threads.h"

namespace fastlora::FL_ISA {

constexpr int64_t HIGH = 4, WIDE = 64;

template <class T>
struct Weight {
    T* data;
    int64_t row, column, N, K;

    // A row of a block, zeros past its end.
    void read(T* to, int64_t n, int64_t k, int64_t count) const {
        const T* from = data + n * row + k * column;
        if (column == 1 && count == WIDE) {
            std::memcpy(to, from, WIDE * sizeof(T));
            return;
        }
        std::memset(to, 0, WIDE * sizeof(T));
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * column];
    }

    void write(const T* from, int64_t n, int64_t k, int64_t count) const {
        T* to = data + n * row + k * column;
        if (column == 1 && count == WIDE)
            std::memcpy(to, from, WIDE * sizeof(T));
        else
            for (int64_t i = 0; i < count; ++i) to[i * column] = from[i];
    }
};

struct Delta {
    const float *A, *B;  // [R, K], [N, R]
    int64_t K, R;

    // d [HIGH, WIDE] at (n, k); what lies past `rows` and `count` is anything.
    void operator()(float d[HIGH][WIDE], int64_t n, int64_t k, int64_t rows, int64_t count) const {
        constexpr int step = W == 16 ? 64 : W == 8 ? 16 : 4;  // columns that fit the registers
        for (int64_t at = 0; at < count; at += step) {
            if (at + step <= count && rows == HIGH)
                part<HIGH, step / W>(d, n, k, at);
            else
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = at; j < std::min(at + step, count); ++j) {
                        float sum = 0;
                        for (int64_t r = 0; r < R; ++r)
                            sum = std::fma(B[(n + i) * R + r], A[r * K + k + j], sum);
                        d[i][j] = sum;
                    }
        }
    }

    template <int ROWS, int VECTORS>
    void part(float d[HIGH][WIDE], int64_t n, int64_t k, int64_t at) const {
        F sum[ROWS][VECTORS];
        for (auto& row : sum)
            for (F& s : row) s = zero();
        for (int64_t r = 0; r < R; ++r) {
            F a[VECTORS];
            for (int v = 0; v < VECTORS; ++v) a[v] = load(A + r * K + k + at + v * W);
            for (int i = 0; i < ROWS; ++i) {
                const F b = splat(B[(n + i) * R + r]);
                for (int v = 0; v < VECTORS; ++v) sum[i][v] = fused(b, a[v], sum[i][v]);
            }
        }
        for (int i = 0; i < ROWS; ++i)
            for (int v = 0; v < VECTORS; ++v) store(d[i] + at + v * W, sum[i][v]);
    }
};

// to = round(from + sign * d), W elements at a time.
template <class T>
inline void shifted(T* to, const T* from, const float* d, float sign) {
    for (int i = 0; i < WIDE; i += W)
        store_exact(to + i, fused(splat(sign), load(d + i), load(from + i)));
}

template <class T>
inline uint32_t raw(T value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

// What an infinity has in its exponent, and NaN too.
inline uint32_t exponent(float) { return 0x7f800000; }
inline uint32_t exponent(bf16) { return 0x7f80; }
inline uint32_t exponent(f16) { return 0x7c00; }

template <class T>
inline bool finite(T value) {
    return (raw(value) & exponent(value)) != exponent(value);
}

template <class T>
inline bool all_finite(const T* values) {
    bool good = true;
    for (int i = 0; i < WIDE; ++i) good &= finite(values[i]);
    return good;
}

// Of a row of a block, whose words' places begin at `place`.
template <class T>
inline uint64_t checksum(const T* row, uint64_t place) {
    constexpr int words = WIDE * sizeof(T) / 8;
    uint64_t word[words], sum = 0;
    std::memcpy(word, row, sizeof word);
    for (int i = 0; i < words; ++i) {
        const uint64_t key = (place + i + 1) * 0x9e3779b97f4a7c15u;
        sum += uint64_t(uint32_t(word[i]) + uint32_t(key)) *
               uint64_t(uint32_t(word[i] >> 32) + uint32_t(key >> 32));
    }
    return sum;
}

template <class T>
class Merge {
  public:
    Merge(Weight<T> weight, Delta delta, int threads)
        : w(weight), delta(delta), tiles(weight.N, weight.K), threads(threads) {}

    // FASTLORA_OK with the receipt, or another code, the weight as before.
    int merge(Receipt& receipt) const {
        receipt.element_size = sizeof(T);
        receipt.tiles.resize(tiles.count);
        std::atomic<int> code{FASTLORA_OK};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) {
            try {
                if (code == FASTLORA_OK && !merge_tile(i, receipt.tiles[i]))
                    code = FASTLORA_NOT_FINITE;
            } catch (const std::bad_alloc&) {
                code = FASTLORA_NO_MEMORY;
            }
        }
        if (code != FASTLORA_OK)
            for (int64_t i = 0; i < tiles.count; ++i) roll_back(i, receipt.tiles[i]);
        return code;
    }

    int unmerge(const uint16_t* positions, const T* bits, const int32_t* counts,
                const int64_t* checksums) const {
        std::vector<int64_t> first(tiles.count + 1);
        for (int64_t i = 0; i < tiles.count; ++i) first[i + 1] = first[i] + counts[i];
        std::vector<uint64_t> merged(tiles.count), original(tiles.count);
        const auto all = [&](bool write) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (int64_t i = 0; i < tiles.count; ++i)
                restore(i, positions + first[i], bits + first[i], counts[i], INT64_MAX, write,
                        merged[i], original[i]);
        };
        all(false);
        if (total(merged) != uint64_t(checksums[0])) return FASTLORA_NOT_MERGED;
        if (total(original) != uint64_t(checksums[1])) return FASTLORA_NOT_RESTORED;
        all(true);
        return FASTLORA_OK;
    }

    static uint64_t total(const std::vector<uint64_t>& sums) {
        uint64_t sum = 0;
        for (uint64_t each : sums) sum += each;
        return sum;
    }

  private:
    Weight<T> w;
    Delta delta;
    Tiles tiles;
    int threads;

    // visit(n, k, rows, count, position of its first element) for the tile's blocks, until false.
    template <class Visit>
    bool blocks(int64_t tile, Visit visit) const {
        const int64_t top = tiles.top(tile), left = tiles.left(tile);
        const int64_t height = tiles.rows(tile), width = tiles.columns(tile);
        for (int64_t n = 0; n < height; n += HIGH)
            for (int64_t k = 0; k < width; k += WIDE)
                if (!visit(top + n, left + k, std::min(HIGH, height - n), std::min(WIDE, width - k),
                           n * width + k))
                    return false;
        return true;
    }

    // Words before (n, k), every row beginning with a word of its own.
    uint64_t place(int64_t n, int64_t k) const {
        const uint64_t words = (w.K * sizeof(T) + 7) / 8;
        return n * words + k * sizeof(T) / 8;
    }

    bool merge_tile(int64_t tile, Receipt::Tile& noted) const {
        const int64_t width = tiles.columns(tile);
        return blocks(tile, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t first) {
            alignas(64) float d[HIGH][WIDE] = {};
            alignas(64) T merged[HIGH][WIDE], before[WIDE], back[WIDE];
            delta(d, n, k, rows, count);
            uint64_t sums[2] = {0, 0};
            const size_t held = noted.positions.size();
            for (int64_t i = 0; i < rows; ++i) {
                w.read(before, n + i, k, count);
                if (count < WIDE) std::fill(d[i] + count, d[i] + WIDE, 0.0f);
                shifted(merged[i], before, d[i], 1);
                if (!all_finite(merged[i]) && worse(before, merged[i])) {
                    noted.positions.resize(held);
                    noted.bits.resize(held);
                    return false;
                }
                shifted(back, merged[i], d[i], -1);
                uint64_t changed = different(back, before);
                if (count < WIDE) changed &= (uint64_t(1) << count) - 1;
                for (; changed; changed &= changed - 1) {
                    const int j = __builtin_ctzll(changed);
                    noted.positions.push_back(uint16_t(first + i * width + j));
                    noted.bits.push_back(raw(before[j]));
                }
                sums[0] += checksum(merged[i], place(n + i, k));
                sums[1] += checksum(before, place(n + i, k));
            }
            for (int64_t i = 0; i < rows; ++i) w.write(merged[i], n + i, k, count);
            noted.merged += sums[0];
            noted.original += sums[1];
            ++noted.done;
            return true;
        });
    }

    // Whether a value is finite before and not after.
    static bool worse(const T* before, const T* after) {
        for (int64_t i = 0; i < WIDE; ++i)
            if (finite(before[i]) && !finite(after[i])) return true;
        return false;
    }

    void roll_back(int64_t tile, const Receipt::Tile& noted) const {
        uint64_t merged, original;
        restore(tile, noted.positions.data(), noted.bits.data(), int64_t(noted.bits.size()),
                noted.done, true, merged, original);
    }

    // The first `limit` blocks of a tile as they were; what is noted is in the blocks' order.
    // Bits: T, or the low end of a wider word.
    template <class Bits>
    void restore(int64_t tile, const uint16_t* positions, const Bits* bits, int64_t size,
                 int64_t limit, bool write, uint64_t& merged_sum, uint64_t& original_sum) const {
        const int64_t width = tiles.columns(tile);
        int64_t next = 0, done = 0;
        merged_sum = original_sum = 0;
        blocks(tile, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t first) {
            if (done++ == limit) return false;
            alignas(64) float d[HIGH][WIDE] = {};
            alignas(64) T merged[WIDE], back[HIGH][WIDE];
            delta(d, n, k, rows, count);
            for (int64_t i = 0; i < rows; ++i) {
                w.read(merged, n + i, k, count);
                if (count < WIDE) std::fill(d[i] + count, d[i] + WIDE, 0.0f);
                shifted(back[i], merged, d[i], -1);
                const int64_t begin = first + i * width;
                for (; next < size; ++next) {
                    const int64_t j = positions[next] - begin;
                    if (j < 0 || j >= count) break;
                    std::memcpy(&back[i][j], &bits[next], sizeof(T));
                }
                if (count < WIDE) std::memset(&back[i][count], 0, (WIDE - count) * sizeof(T));
                merged_sum += checksum(merged, place(n + i, k));
                original_sum += checksum(back[i], place(n + i, k));
            }
            if (write)
                for (int64_t i = 0; i < rows; ++i) w.write(back[i], n + i, k, count);
            return true;
        });
    }
};

}  // namespace fastlora::FL_ISA
