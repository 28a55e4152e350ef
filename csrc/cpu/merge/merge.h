// W = round(W + d) in place, and back again, bit for bit.
//
// Reads and writes W once, block by block: each is computed, checked and noted in the receipt
// before it is stored. With M the merged weight, the receipt keeps two things: what round(M - d)
// does not give back of W, and two checksums, of M, and of all else in the receipt together with
// the factors. If both are right, the weight comes back right.
#pragma once

#include <atomic>

#include "fastlora.h"
#include "cpu/merge/checksum.h"
#include "cpu/merge/receipt.h"
#include "cpu/threads.h"
#include "cpu/merge/weight.h"

namespace fastlora::FL_ISA {

template <class T>
class Merge {
  public:
    Merge(Weight<T> weight, const Delta& delta, int threads)
        : w(weight), delta(delta), tiles(weight.N, weight.K), threads(threads) {}

    // FASTLORA_OK with the receipt, or another code, the weight as before.
    int merge(Receipt& receipt) const {
        receipt.element_size = sizeof(T);
        receipt.tiles.resize(tiles.count);
        std::atomic<int> code{FASTLORA_OK};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) {
            const Rounding rounding;
            try {
                if (code == FASTLORA_OK && !merge_tile(i, receipt.tiles[i]))
                    code = FASTLORA_NOT_FINITE;
                receipt.tiles[i].fit(sizeof(T));
            } catch (const std::bad_alloc&) {
                code = FASTLORA_NO_MEMORY;
            }
        }
        if (code != FASTLORA_OK) undo(receipt);
        return code;
    }

    // What merge() has written, as it was.
    void undo(const Receipt& receipt) const {
        const Rounding rounding;
        for (int64_t i = 0; i < tiles.count; ++i) {
            const Receipt::Tile& of = receipt.tiles[i];
            restore(i, of.positions.data(), reinterpret_cast<const T*>(of.bits.data()), of.size,
                    of.done);
        }
    }

    int unmerge(const uint16_t* positions, const T* bits, const int32_t* counts, uint64_t merged,
                bool whole) const {
        std::vector<int64_t> first(tiles.count + 1);
        for (int64_t i = 0; i < tiles.count; ++i) first[i + 1] = first[i] + counts[i];
        uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) sum += checksum_of(i);
        if (sum != merged) return FASTLORA_NOT_MERGED;
        if (!whole) return FASTLORA_NOT_RESTORED;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < tiles.count; ++i) {
            const Rounding rounding;
            restore(i, positions + first[i], bits + first[i], counts[i], INT64_MAX);
        }
        return FASTLORA_OK;
    }

  private:
    Weight<T> w;
    const Delta& delta;
    Tiles tiles;
    int threads;

    template <class Visit>
    bool blocks(int64_t tile, Visit visit) const {
        return visit_blocks(tiles, tile, visit);
    }

    // Of a row of a block. Words are counted from the weight's first, rows begin with a new one.
    Sum checksum(Sum sum, const T* row, int64_t n, int64_t k) const {
        const uint64_t before = n * ((w.K * sizeof(T) + 7) / 8) + k * sizeof(T) / 8;
        return keyed_sum(sum, row, BLOCK_K * sizeof(T) / 8, before + 1, KEY);
    }

    uint64_t checksum_of(int64_t tile) const {
        Sum sum{};
        blocks(tile, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t) {
            alignas(64) T copy[BLOCK_K];
            for (int64_t i = 0; i < rows; ++i)
                sum = checksum(sum, w.read(copy, n + i, k, count), n + i, k);
            return true;
        });
        return total(sum);
    }

    bool merge_tile(int64_t tile, Receipt::Tile& noted) const {
        const int64_t width = tiles.columns(tile);
        Sum sum{};
        const bool good =
            blocks(tile, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t first) {
                alignas(64) float d[BLOCK_N][LINE];
                alignas(64) T merged[BLOCK_N][LINE], copy[BLOCK_K];
                delta(d, n, k);
                make_room(noted);
                uint16_t* positions = noted.positions.data() + noted.size;
                T* bits = reinterpret_cast<T*>(noted.bits.data()) + noted.size;
                int64_t size = 0;
                for (int64_t i = 0; i < rows; ++i) {
                    const T* before = w.read(copy, n + i, k, count);
                    Exponents seen{};
                    for (int v = 0; v < BLOCK_K; v += W) {
                        const F old = load(before + v), change = load(d[i] + v);
                        const F exact = add(old, change), fresh = rounded<T>(exact);
                        // Of bfloat16 rounded() may make a number of a NaN.
                        seen = largest(largest(seen, exact), fresh);
                        put(merged[i] + v, fresh);
                        const uint32_t differ = differs(rounded<T>(subtract(fresh, change)), old);
                        size += note(positions + size, bits + size, differ,
                                     int(first + i * width + v), before + v);
                    }
                    if (!finite(seen))
                        return odd_block(noted, n, k, rows, count, first, width, d, sum);
                }
                for (int64_t i = 0; i < rows; ++i) {
                    sum = checksum(sum, merged[i], n + i, k);
                    w.write(merged[i], n + i, k, count);
                }
                noted.size += size;
                ++noted.done;
                return true;
            });
        noted.checksum = total(sum);
        return good;
    }

    // The same for a block with infinities or NaN in it; false, nothing stored, where one is new.
    bool odd_block(Receipt::Tile& noted, int64_t n, int64_t k, int64_t rows, int64_t count,
                   int64_t first, int64_t width, const float d[BLOCK_N][LINE], Sum& sum) const {
        T merged[BLOCK_N][BLOCK_K], copy[BLOCK_K], back[BLOCK_K];
        uint16_t* positions = noted.positions.data() + noted.size;
        T* bits = reinterpret_cast<T*>(noted.bits.data()) + noted.size;
        int64_t size = 0;
        for (int64_t i = 0; i < rows; ++i) {
            const T* before = w.read(copy, n + i, k, count);
            for (int v = 0; v < BLOCK_K; v += W)
                store_exact(merged[i] + v, add(load(before + v), load(d[i] + v)));
            restore_row(back, merged[i], d[i]);
            if (count < BLOCK_K) std::memset(&merged[i][count], 0, (BLOCK_K - count) * sizeof(T));
            for (int64_t j = 0; j < count; ++j) {
                if (is_finite(before[j]) && !is_finite(merged[i][j])) return false;
                if (std::memcmp(&back[j], &before[j], sizeof(T)) == 0) continue;
                positions[size] = uint16_t(first + i * width + j);
                bits[size++] = before[j];
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            sum = checksum(sum, merged[i], n + i, k);
            w.write(merged[i], n + i, k, count);
        }
        noted.size += size;
        ++noted.done;
        return true;
    }

    static bool is_finite(T value) { return std::isfinite(widen(value)); }

    // For every element of a block and for what a vector writes past the last one.
    static void make_room(Receipt::Tile& noted) {
        const size_t most = noted.size + BLOCK_N * BLOCK_K + W;
        if (most <= noted.positions.size()) return;
        const size_t room = std::max<size_t>(most + most / 2, TILE / 16);
        noted.positions.resize(room);
        noted.bits.resize(room * sizeof(T));
    }

    // The first `limit` blocks of a tile as they were; what is noted is in the blocks' order.
    void restore(int64_t tile, const uint16_t* positions, const T* bits, int64_t size,
                 int64_t limit) const {
        const int64_t width = tiles.columns(tile);
        int64_t next = 0, done = 0;
        blocks(tile, [&](int64_t n, int64_t k, int64_t rows, int64_t count, int64_t first) {
            if (done++ == limit) return false;
            alignas(64) float d[BLOCK_N][LINE];
            alignas(64) T copy[BLOCK_K], back[BLOCK_K];
            delta(d, n, k);
            for (int64_t i = 0; i < rows; ++i) {
                restore_row(back, w.read(copy, n + i, k, count), d[i]);
                const int64_t begin = first + i * width;
                for (; next < size; ++next) {
                    const int64_t j = positions[next] - begin;
                    if (j < 0 || j >= count) break;
                    back[j] = bits[next];
                }
                w.write(back, n + i, k, count);
            }
            return true;
        });
    }

    static void restore_row(T* back, const T* merged, const float* d) {
        for (int v = 0; v < BLOCK_K; v += W)
            store_exact(back + v, subtract(load(merged + v), load(d + v)));
    }
};

}  // namespace fastlora::FL_ISA
