// Few rows, each with its own adapter: h[t] = x[t] a, y[t] = x[t] w + factor_t h[t] b (+ bias).
//
// Two launches, the second beside the first: it streams w while h is summed, and waits for h when
// its own sums are there. Bytes: e (K N + T (K + N) + n R (K + N)) for n adapters, those of b once
// a block of 32 columns, of a once a row, both from L2 but for the first time. Each row's h and
// delta is a sum in an order of its own, so its bits are the same alone and in any batch.
#pragma once

#include "cuda/multi/adapters.h"
#include "cuda/linear/stream.h"

namespace fastlora {

template <class T>
struct Decode {
    Matrix<T> x, w;  // w of no rows: onto what y holds
    T *y, *h;        // h (T, slices * R), contiguous
    int64_t ldy;
    const T* bias;
    Adapters adapters;
    int64_t M, N;
};

// A block sums 8 ranks of one row: each thread its chunks of k, then all threads in a fixed tree.
constexpr int SHRINK_THREADS = 128, SHRINK_RANKS = 8;

template <class T, class E>
FL_KERNEL(SHRINK_THREADS, 1) row_shrink(FL_PARAMETERS Decode<T> p) {
    dependents_may_begin();
    const Adapters& own = p.adapters;
    const int64_t row = block(0), K = p.x.columns;
    const int slice = block(1) * SHRINK_RANKS / own.R, rank = block(1) * SHRINK_RANKS % own.R;
    const int slot = slot_of(own, row), ranks = ranks_of(own, slot);
    float sums[SHRINK_RANKS] = {};
    const E* rows[SHRINK_RANKS];
    if (rank < ranks) {
#pragma unroll
        for (int i = 0; i < SHRINK_RANKS; ++i) {
            int64_t holder;
            int within;
            const bool there = rank + i < ranks && find(own, slot, rank + i, holder, within);
            rows[i] = there ? static_cast<const E*>(own.a) + holder * own.a_slot +
                                  slice * own.a_slice + within * own.a_rank
                            : nullptr;
        }
        for (int64_t k = thread() * 8; k < K; k += SHRINK_THREADS * 8) {
            const Chunk b_x = *reinterpret_cast<const Chunk*>(p.x.p + row * p.x.ld + k);
#pragma unroll
            for (int i = 0; i < SHRINK_RANKS; ++i) {
                if (!rows[i]) continue;
                if constexpr (sizeof(E) == 4) {
                    Chunk b_a[2];
                    b_a[0] = *reinterpret_cast<const Chunk*>(rows[i] + k);
                    b_a[1] = *reinterpret_cast<const Chunk*>(rows[i] + k + 4);
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const uint32_t word = b_x.word[j / 2];
                        // As T: what a tensor core would take.
                        const float a = number(rounded<T>(as_float(b_a[j / 4].word[j % 4])));
                        sums[i] = fused(j % 2 ? high<T>(word) : low<T>(word), a, sums[i]);
                    }
                } else {
                    const Chunk b_a = *reinterpret_cast<const Chunk*>(rows[i] + k);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        sums[i] = fused(low<T>(b_x.word[j]), low<T>(b_a.word[j]), sums[i]);
                        sums[i] = fused(high<T>(b_x.word[j]), high<T>(b_a.word[j]), sums[i]);
                    }
                }
            }
        }
    }
    float* of_warps = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int i = 0; i < SHRINK_RANKS; ++i) {
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
        if (lane() == 0) of_warps[warp() * SHRINK_RANKS + i] = sums[i];
    }
    sync_block();
    if (thread() < SHRINK_RANKS) {
        float sum = 0.0f;
        for (int w = 0; w < SHRINK_THREADS / 32; ++w) sum += of_warps[w * SHRINK_RANKS + thread()];
        p.h[(row * own.slices + slice) * own.R + rank + thread()] = rounded<T>(sum);
    }
}

template <class T, class E, int BM, int STAGES, bool WEIGHT>
struct DecodeTile {
    static constexpr int BN = 32, RANKS = 64;
    using Columns = Stream<T, BY_N, BM, BN, 0, STAGES>;
    static constexpr int THREADS = Columns::THREADS, ROWS = BM / Columns::WARPS;
    // b of an adapter's 64 ranks, an item; two halves of FOUR items each, one in use, one coming.
    static constexpr int ITEM = BN * RANKS * sizeof(E) / 16, FOUR = 4;
    static constexpr int ITEMS = 2 * FOUR * ITEM;
    static constexpr int BASE = WEIGHT ? Columns::SHARED / 16 : 0;
    // Up to RANKS of a slot's ranks, from `first` on, and which of the block's rows have that slot.
    struct Item {
        uint64_t rows;
        int slot, first, ranks, unused;
    };
    static int shared(int R) {
        return (BASE + ITEMS) * 16 + BM * ((R + RANKS - 1) / RANKS) * sizeof(Item) +
               (2 * BM + 1) * 4;
    }

    // What the block's rows want, every slot once: the items, slot and number of items of each row.
    struct Lists {
        Item* items;
        int *slots, *counts, *total;
    };

    FL_DEVICE static Lists list(const Decode<T>& p, Chunk* memory, int64_t row) {
        Item* items = reinterpret_cast<Item*>(memory);
        const int parts = (p.adapters.R + RANKS - 1) / RANKS;
        int* numbers = reinterpret_cast<int*>(items + BM * parts);
        const Lists lists{items, numbers, numbers + BM, numbers + 2 * BM};
        const int t = thread();
        const int slot = t < BM && row + t < p.M ? slot_of(p.adapters, row + t) : -1;
        const int ranks = ranks_of(p.adapters, slot);
        if (t < BM) lists.slots[t] = slot;
        sync_block();
        uint64_t rows = 0;
        if (t < BM) {
            for (int i = 0; i < BM; ++i) rows |= uint64_t(lists.slots[i] == slot) << i;
            const bool first = slot >= 0 && !(rows & ((uint64_t(1) << t) - 1));
            lists.counts[t] = first ? (ranks + RANKS - 1) / RANKS : 0;
        }
        sync_block();
        if (t < BM) {
            int at = 0;
            for (int i = 0; i < t; ++i) at += lists.counts[i];
            for (int i = 0; i < lists.counts[t]; ++i) {
                const int left = ranks - i * RANKS;
                items[at + i] = {rows, slot, i * RANKS, left < RANKS ? left : RANKS, 0};
            }
            if (t == BM - 1) *lists.total = at + lists.counts[t];
        }
        sync_block();
        return lists;
    }

    // Whether a rank's elements of neighbouring columns lie side by side.
    FL_DEVICE static bool by_rank(const Decode<T>& p) { return p.adapters.b_column == 1; }

    FL_DEVICE static void load(const Decode<T>& p, const Lists& lists, Chunk* items, int half,
                               int64_t column) {
        constexpr int EACH = 16 / sizeof(E);  // elements of a chunk
        constexpr int N_CHUNKS = BN / EACH, RANK_CHUNKS = RANKS / EACH;
        const Adapters& own = p.adapters;
        for (int i = 0; i < FOUR; ++i) {
            const int number = half * FOUR + i;
            if (number >= *lists.total) break;
            const Item entry = lists.items[number];
            Chunk* item = items + (half % 2 * FOUR + i) * ITEM;
            for (int c = thread(); c < ITEM; c += THREADS) {
                const int r = by_rank(p) ? c / N_CHUNKS : c % RANK_CHUNKS * EACH;
                const int n = by_rank(p) ? c % N_CHUNKS * EACH : c / RANK_CHUNKS;
                int64_t holder = 0;
                int within = 0;
                const bool there = r < entry.ranks && column + n < p.N &&
                                   find(own, entry.slot, entry.first + r, holder, within);
                const E* b = static_cast<const E*>(own.b);
                if (there)
                    b += holder * own.b_slot + within * own.b_rank + (column + n) * own.b_column;
                const int at = by_rank(p) ? place<N_CHUNKS>(r, c % N_CHUNKS)
                                          : place<RANK_CHUNKS>(n, c % RANK_CHUNKS);
                copy_async(item + at, b, there);
            }
        }
    }

    // b of 8 ranks from r on, of the lane's column.
    FL_DEVICE static void read(float (&b)[8], const Decode<T>& p, const Chunk* item, int r) {
        constexpr int EACH = 16 / sizeof(E);  // elements of a chunk
        constexpr int N_CHUNKS = BN / EACH, RANK_CHUNKS = RANKS / EACH;
        const int n = lane();
        if (by_rank(p)) {
            const E* e = reinterpret_cast<const E*>(item);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                b[j] = number(e[place<N_CHUNKS>(r + j, n / EACH) * EACH + n % EACH]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j += EACH) {
                const Chunk chunk = item[place<RANK_CHUNKS>(n, (r + j) / EACH)];
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const uint32_t word = chunk.word[e * int(sizeof(E)) / 4];
                    if constexpr (sizeof(E) == 4)
                        b[j + e] = as_float(word);
                    else
                        b[j + e] = e % 2 ? high<T>(word) : low<T>(word);
                }
            }
        }
        // As T: what a tensor core would take.
        if constexpr (sizeof(E) == 4)
#pragma unroll
            for (int j = 0; j < 8; ++j) b[j] = number(rounded<T>(b[j]));
    }

    FL_DEVICE static void run(const Decode<T>& p) {
        Chunk* memory = reinterpret_cast<Chunk*>(shared_memory());
        Chunk* items = memory + BASE;
        const Adapters& own = p.adapters;
        const int64_t row = int64_t(block(1)) * BM, column = int64_t(block(0)) * BN;
        Lists lists;
        const auto load_first = [&] {
            lists = list(p, items + ITEMS, row);
            load(p, lists, items, 0, column);
            load(p, lists, items, 1, column);
        };
        const float* sums = nullptr;
        if constexpr (WEIGHT) {
            sums = Columns::run(memory, p.x, p.w, p.w, row, column, 0, load_first);
        } else {
            load_first();
            copies_commit();
            copies_wait<0>();
            sync_block();
        }
        wait_for_previous();

        const int64_t n = column + lane();
        const T* h = p.h + slice_of(own, n) * own.R;
        float delta[ROWS] = {};
        for (int half = 0; half * FOUR < *lists.total; ++half) {
            for (int i = 0; i < FOUR && half * FOUR + i < *lists.total; ++i) {
                const Item entry = lists.items[half * FOUR + i];
                const Chunk* item = items + (half % 2 * FOUR + i) * ITEM;
                const uint32_t mine = uint32_t(entry.rows >> (warp() * ROWS)) & ((1u << ROWS) - 1);
                if (!mine) continue;
                for (int r = 0; r < entry.ranks; r += 8) {
                    float b_b[8];
                    read(b_b, p, item, r);
#pragma unroll
                    for (int m = 0; m < ROWS; ++m) {
                        if (!(mine >> m & 1)) continue;
                        const int t = warp() * ROWS + m;
                        const Chunk b_h = *reinterpret_cast<const Chunk*>(
                            h + (row + t) * own.slices * own.R + entry.first + r);
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            const uint32_t word = b_h.word[j / 2];
                            const float value = j % 2 ? high<T>(word) : low<T>(word);
                            // Past the slot's ranks there may be anything.
                            if (r + j < entry.ranks) delta[m] = fused(value, b_b[j], delta[m]);
                        }
                    }
                }
            }
            sync_block();
            load(p, lists, items, half + 2, column);
            copies_commit();
            copies_wait<1>();
            sync_block();
        }
        if (n >= p.N) return;
        const float bias = p.bias ? number(p.bias[n]) : 0.0f;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            const int t = warp() * ROWS + m, slot = lists.slots[t];
            if (row + t >= p.M) continue;
            const bool any = ranks_of(own, slot) > 0;
            T* y = p.y + (row + t) * p.ldy + n;
            if (!WEIGHT && !any) continue;
            float sum = WEIGHT ? sums[t * BN + lane()] : number(*y);
            if (any) sum = fused(factor_of(own, slot, row + t), delta[m], sum);
            *y = rounded<T>(sum + bias);
        }
    }
};

template <class S, class T>
FL_KERNEL(S::THREADS, 1) decode(FL_PARAMETERS Decode<T> p) {
    S::run(p);
}

}  // namespace fastlora
