// Weights changed in place, exactly undone: adapters into them, out of them, one for another.
//
// A block has one tile of one of many weights. In registers it computes
//
//     U = M without d_old, to the bit:  round(M - d_old), then what the receipt holds
//     M' = round(U + d_new), and what round(M' - d_new) does not give back of U into a new receipt
//
// and stores the tile once, or not at all where M is not what the old receipt left, U not what it
// was, or M' not finite: the tile's state says so, and the host takes the others back. Moves each
// weight once: 2 size bytes an element, and 2 + size for each that the receipt keeps.
#pragma once

#include "cuda/merge/delta.h"
#include "cuda/merge/operands.h"

namespace fastlora {

// ALIGNED: weights whose rows are whole chunks; others are read and written one by one.
template <class T, bool ALIGNED>
struct Merge {
    using W = Words<T>;
    using Raw = typename W::Raw;
    using Packed = typename W::Packed;
    static constexpr int EACH = W::EACH, ACROSS = 8 / EACH, BITS = 8 * sizeof(Raw);
    // The thread's elements as they are in memory: words of [row][column].
    using Bits = uint32_t[2][ACROSS];

    static constexpr int TILE = TILE_N * TILE_K * sizeof(Raw);
    static constexpr int BODY = TILE > DELTA_SHARED ? TILE : DELTA_SHARED;
    // Beside the body: a sum of each warp, and what one thread tells the others.
    static constexpr int SHARED = BODY + 16 * 8;

    const Swap& p;
    const int64_t* row;  // of the table
    int64_t tile, N, K, n, k, row_stride, column_stride;
    Raw* weight;
    Chunk* memory;

    FL_DEVICE bool inside(int i, int column) const {
        // A chunk is inside, or none of it.
        const int64_t from = k + tile_column(ALIGNED ? column / 8 * 8 : column);
        return n + tile_row(i) < N && from < K;
    }

    FL_DEVICE Raw* at(int i, int column) const {
        return weight + (n + tile_row(i)) * row_stride +
               (k + tile_column(column)) * (ALIGNED ? 1 : column_stride);
    }

    FL_DEVICE void read(Bits& bits) const {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; c += 4) {
                Chunk chunk = {};
                if constexpr (ALIGNED) {
                    if (inside(i, c * EACH)) load_global(chunk.word, at(i, c * EACH));
                } else {
#pragma unroll
                    for (int e = 0; e < 4 * EACH; ++e)
                        if (inside(i, c * EACH + e))
                            chunk.word[e / EACH] |= uint32_t(*at(i, c * EACH + e))
                                                    << (e % EACH * 16);
                }
                for (int w = 0; w < 4; ++w) bits[i][c + w] = chunk.word[w];
            }
    }

    FL_DEVICE void write(const Bits& bits) const {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; c += 4) {
                const Chunk chunk = {{bits[i][c], bits[i][c + 1], bits[i][c + 2], bits[i][c + 3]}};
                if constexpr (ALIGNED) {
                    if (inside(i, c * EACH)) store_global(at(i, c * EACH), chunk.word);
                } else {
#pragma unroll
                    for (int e = 0; e < 4 * EACH; ++e)
                        if (inside(i, c * EACH + e))
                            *at(i, c * EACH + e) = Raw(chunk.word[e / EACH] >> (e % EACH * 16));
                }
            }
    }

    // The sum over all threads, the same for each.
    FL_DEVICE uint64_t total(uint64_t own) const {
        uint64_t* of_warps = reinterpret_cast<uint64_t*>(memory + BODY / 16);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) own += shuffle_xor(own, mask);
        sync_block();
        if (lane() == 0) of_warps[warp()] = own;
        sync_block();
        uint64_t sum = 0;
        for (int w = 0; w < MERGE_THREADS / 32; ++w) sum += of_warps[w];
        return sum;
    }

    // Words times keys, which are odd and differ, modulo 2^64: neither a changed element nor two
    // that change places or signs leave it as it is.
    FL_DEVICE int64_t checksum(const Bits& bits) const {
        uint64_t sum = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; ++c) {
                const uint32_t place = (tile_row(i) * TILE_K + tile_column(c * EACH)) / EACH;
                // 2^32 over the golden ratio.
                sum += uint64_t(bits[i][c]) * ((2 * place + 1) * 0x9E3779B1u);
            }
        return int64_t(total(sum));
    }

    // d of adapters of the table, from column `list` of the weight's row on; 0 outside the weight,
    // where factors that are not finite would leave NaN, and checksums that nobody finds again.
    FL_DEVICE void find_delta(Tile& d, int list, int dtype) const {
        delta(d, p.adapters, p.scales, row[list], row[list + 1], dtype, n, k, N, K, memory);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (!inside(i / 8, i % 8)) d[i / 8][i % 8] = 0.0f;
    }

    // round(bits + sign * d)
    FL_DEVICE static void add(Bits& to, const Bits& bits, const Tile& d, float sign) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; ++c) {
                float f[EACH];
#pragma unroll
                for (int e = 0; e < EACH; ++e)
                    f[e] = fused(sign, d[i][c * EACH + e], W::get(bits[i][c], e));
                to[i][c] = W::put(f);
            }
    }

    FL_DEVICE static bool infinite(float f) { return (as_bits(f) & 0x7FFFFFFF) >= 0x7F800000; }

    // Whether all that was finite still is.
    FL_DEVICE bool finite(const Bits& merged, const Bits& before) const {
        float seen = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            seen = fused(W::get(merged[i / 8][i % 8 / EACH], i % EACH), 0.0f, seen);
        uint64_t bad = 0;
        // Seldom, so looked at closely only here.
        if (seen != seen)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int c = 0; c < 8; ++c)
                    bad += inside(i, c) && infinite(W::get(merged[i][c / EACH], c % EACH)) &&
                           !infinite(W::get(before[i][c / EACH], c % EACH));
        return total(bad) == 0;
    }

    // What the old receipt holds of this tile, over what subtraction gave. Positions that no tile
    // has are passed over: an edited receipt is refused by its checksum, and writes nowhere else.
    FL_DEVICE void put_back(Bits& bits) const {
        const int64_t from = p.old_offsets[tile], count = p.old_counts[tile];
        if (count == 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; c += 4)
                memory[chunk_of(i, c)] = {
                    {bits[i][c], bits[i][c + 1], bits[i][c + 2], bits[i][c + 3]}};
        sync_block();
        Raw* elements = reinterpret_cast<Raw*>(memory);
        for (int64_t e = thread(); e < count; e += MERGE_THREADS) {
            uint32_t position;
            Raw raw;
            if (p.pooled) {
                const Packed both = reinterpret_cast<const Packed*>(row[11])[from + e];
                position = uint32_t(both >> BITS), raw = Raw(both);
            } else {
                position = reinterpret_cast<const uint16_t*>(row[11])[from + e];
                raw = reinterpret_cast<const Raw*>(row[12])[from + e];
            }
            if (position >= TILE_N * TILE_K) continue;
            const int own_row = position / TILE_K, column = position % TILE_K;
            if (n + own_row < N && k + column < K) {
                constexpr int CHUNK = 16 / sizeof(Raw);
                const int chunk = place<TILE_K / CHUNK>(own_row, column / CHUNK);
                elements[chunk * CHUNK + column % CHUNK] = raw;
            }
        }
        sync_block();
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < ACROSS; c += 4)
                for (int w = 0; w < 4; ++w) bits[i][c + w] = memory[chunk_of(i, c)].word[w];
        sync_block();
    }

    FL_DEVICE static int chunk_of(int i, int c) {
        constexpr int CHUNK = 16 / sizeof(Raw);
        return place<TILE_K / CHUNK>(tile_row(i), tile_column(c * EACH) / CHUNK);
    }

    // Elements that subtraction will not give back, to the pool in the order of the threads.
    FL_DEVICE State keep(const Bits& merged, const Bits& before, const Tile& d, State state) const {
        Bits back;
        add(back, merged, d, -1.0f);
        uint32_t lost = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32_t other = back[i / 8][i % 8 / EACH] ^ before[i / 8][i % 8 / EACH];
            const bool differs = EACH == 1 ? other != 0 : (other >> (i % EACH * 16) & 0xFFFF) != 0;
            if (differs && inside(i / 8, i % 8)) lost |= 1u << i;
        }
        int own = 0;
        for (uint32_t left = lost; left; left &= left - 1) ++own;
        int upto = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = shuffle_up(upto, distance);
            if (lane() >= distance) upto += below;
        }
        int64_t* told = reinterpret_cast<int64_t*>(memory + BODY / 16);
        sync_block();
        if (lane() == 31) told[warp()] = upto;
        sync_block();
        int64_t at = upto - own, count = 0;
        for (int w = 0; w < MERGE_THREADS / 32; ++w) {
            if (w < warp()) at += told[w];
            count += told[w];
        }
        if (thread() == 0) p.counts[tile] = int32_t(count);
        if (state != DONE) return state;
        if (thread() == 0) told[8] = atomic_add(p.cursor, count);
        sync_block();
        const int64_t first = told[8];
        if (first + count > p.capacity) return NO_ROOM;
        if (thread() == 0) p.offsets[tile] = first;
        Packed* pool = static_cast<Packed*>(p.pool) + first + at;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (!(lost >> i & 1)) continue;
            const uint32_t position = tile_row(i / 8) * TILE_K + tile_column(i % 8);
            const uint32_t word = before[i / 8][i % 8 / EACH];
            const Raw raw = Raw(EACH == 1 ? word : word >> (i % EACH * 16));
            *pool++ = Packed(position) << BITS | raw;
        }
        return state;
    }

    FL_DEVICE State run() const {
        Bits bits, merged;
        Tile d;
        read(bits);
        if (p.undo) {
            if (p.check && checksum(bits) != p.old_sums[2 * tile]) return NOT_MERGED;
            find_delta(d, 7, p.old_dtype);
            add(bits, bits, d, -1.0f);
            put_back(bits);
            if (p.check && checksum(bits) != p.old_sums[2 * tile + 1]) return NOT_RESTORED;
        }
        if (!p.merge) {
            write(bits);
            return DONE;
        }
        find_delta(d, 9, p.new_dtype);
        add(merged, bits, d, 1.0f);
        State state = finite(merged, bits) ? DONE : NOT_FINITE;
        if (p.keep) state = keep(merged, bits, d, state);
        if (p.check) {
            const int64_t of_merged = checksum(merged), of_before = checksum(bits);
            if (thread() == 0) p.sums[2 * tile] = of_merged, p.sums[2 * tile + 1] = of_before;
        }
        if (state == DONE) write(merged);
        return state;
    }
};

template <class T, bool ALIGNED>
FL_KERNEL(MERGE_THREADS, ALIGNED ? 2 : 1) swap_tiles(FL_PARAMETERS Swap p) {
    const int64_t tile = block();
    // One wait for both.
    const int32_t state_before = p.states[tile], number = p.weight_of[tile];
    if (state_before != p.wanted) return;
    const int64_t* row = p.weights + int64_t(number) * WEIGHT;
    const int64_t own = tile - row[5];
    // clang-format off
    const Merge<T, ALIGNED> merge{
        p, row, tile, row[3], row[4], own / row[6] * TILE_N, own % row[6] * TILE_K, row[1], row[2],
        reinterpret_cast<typename Words<T>::Raw*>(row[0]),
        reinterpret_cast<Chunk*>(shared_memory())};
    // clang-format on
    const State state = merge.run();
    // All have read the state that was.
    sync_block();
    if (thread() == 0) p.states[tile] = state;
}

// A tile's part of a pool to its place in the receipt.
struct Gather {
    uint16_t* positions;
    void* bits;
    const void* pool;
    const int64_t *starts, *offsets;
    const int32_t* counts;
};

template <class T>
FL_KERNEL(MERGE_THREADS, 1) gather(FL_PARAMETERS Gather p) {
    using Packed = typename Words<T>::Packed;
    using Raw = typename Words<T>::Raw;
    const int64_t to = p.starts[block()], from = p.offsets[block()];
    for (int64_t e = thread(); e < p.counts[block()]; e += MERGE_THREADS) {
        const Packed both = static_cast<const Packed*>(p.pool)[from + e];
        p.positions[to + e] = uint16_t(both >> (8 * sizeof(Raw)));
        static_cast<Raw*>(p.bits)[to + e] = Raw(both);
    }
}

}  // namespace fastlora
