// y += s (x A^T) B^T for rows that each have their own adapter, or y = x W^T + bias + the same.
//
// Reads x, W, y and every adapter in use once. Two phases, each spread over the threads:
//   h = x A^T        a task is a block of MB rows (for few rows: a part of its ranks)
//   y = ... + h B^T  a task is a range of outputs (for many rows: a group of rows)
// With W the sums of x W^T wait in float32 for the adapter's part: one rounding.
#pragma once

#include <vector>

#include "cpu/buffer.h"
#include "cpu/linear/dots.h"
#include "cpu/linear/rows.h"
#include "cpu/threads.h"

namespace fastlora::FL_ISA {

// Up to so many rows, without W and with it, a task of the second phase takes all; beyond, groups.
constexpr int64_t FEW = 64, FEW_WITH_W = 128, GROUP = 32;
// Outputs a task: float32 sums of FEW rows stay in a core's cache.
constexpr int64_t OUTPUTS = 256;

template <class X, class T>
class LoRARows {
  public:
    // Allocates; run() does not.
    explicit LoRARows(const Rows<X, T>& rows) : a(rows), M(a.shape.M), K(a.shape.K) {
        blocks = (M + MB - 1) / MB;
        parts = blocks < a.threads ? std::min<int64_t>(a.threads, (a.shape.R + NB - 1) / NB) : 1;
        parts = std::max<int64_t>(parts, 1);
        ranks = quads<X>(a.shape.R) * QUAD<X>;
        h.resize(M * ranks);
        packed = Buffer<X>((a.weight ? blocks : a.threads) * packed_size<X>(K));
        few = M <= (a.weight ? FEW_WITH_W : FEW);
        group = few ? std::max<int64_t>(M, 1) : a.weight ? FEW : GROUP;
        outputs = std::max<int64_t>(a.shape.N, 1);
        if (few || a.weight) {
            // Four tasks a thread, so that none waits long for the last one.
            const int64_t share = a.shape.N / (4 * a.threads) / W * W;
            outputs = std::clamp<int64_t>(share, 2 * W, OUTPUTS);
        }
        columns = Buffer<F>(a.threads * columns_size());
        wide = Buffer<float>(a.threads * MB * ranks);
        y_rows = Buffer<X*>(a.threads * group);
        scales = Buffer<float>(a.threads * group);
        sums = Buffer<float>(a.weight ? a.threads * group * outputs : 0);
        const int64_t matrices = a.pages ? a.pages->total : group;
        for (int i = 0; i < a.threads; ++i) prefetches.emplace_back(a.weight ? matrices : 0);
    }

    void run() {
        const int64_t ranges = (a.shape.N + outputs - 1) / outputs;
        const int64_t groups = (M + group - 1) / group;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
        {
            if (a.weight) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < blocks; ++i) pack_block(i, i);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < blocks * parts; ++i) shrink(i / parts, i % parts);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < groups * ranges; ++i) {
                // W's rows stay in a cache while the groups pass by, otherwise y's.
                const int64_t first = (a.weight ? i % groups : i / ranges) * group;
                const int64_t n = (a.weight ? i / groups : i % ranges) * outputs;
                expand_range(first, std::min(group, M - first), n,
                             std::min(outputs, a.shape.N - n));
            }
        }
    }

  private:
    using packets = Packets<X>;
    using H = typename packets::H;

    Rows<X, T> a;
    int64_t M, K, blocks, parts, ranks, group, outputs;
    bool few;
    std::vector<H> h;                     // [M, ranks], grouped rows, zeros past a slot's rank
    Buffer<X> packed;                     // [blocks] where x is needed twice, else [threads]
    Buffer<float> wide;                   // [threads, MB, ranks] of h
    Buffer<F> columns;                    // [threads] panels of B
    Buffer<X*> y_rows;                    // [threads, group]
    Buffer<float> scales;                 // [threads, group]
    Buffer<float> sums;                   // [threads, group, outputs]
    std::vector<Prefetch<T>> prefetches;  // [threads]

    int64_t columns_size() const { return panel_size<X>(a.shape.R); }

    void pack_block(int64_t block, int64_t to) {
        const int64_t first = block * MB;
        pack<X>(
            packed.get() + to * packed_size<X>(K), std::min<int64_t>(MB, M - first),
            [&](int64_t i) { return a.x + a.row(first + i) * a.ldx; }, K);
    }

    // h of a block's rows, the part'th share of the ranks.
    void shrink(int64_t block, int64_t part) {
        const int64_t begin = block * MB, end = std::min(begin + MB, M);
        const int64_t place = a.weight ? block : omp_get_thread_num();
        float* sum = wide.get() + omp_get_thread_num() * MB * ranks;
        bool fresh = a.weight != nullptr;
        a.segments(begin, end, [&](int64_t s, int64_t first, int64_t count) {
            const Slot<T> slot = a.slot(s);
            if (part == 0 && !a.pages)
                for (int64_t i = first; i < first + count; ++i)
                    std::fill(h_row(i) + slot.r, h_row(i) + a.shape.R, X{});
            const int64_t share = (slot.r + NB * parts - 1) / (NB * parts) * NB;
            const int64_t from = part * share, to = std::min(from + share, slot.r);
            if (from >= to) return;
            if (!fresh) pack_block(block, place);
            fresh = true;
            dots<X, T>(
                packed.get() + place * packed_size<X>(K), first - begin, count, to - from,
                [&](int64_t r) { return A_row(slot, from + r); },
                [&, next = next_slot(first + count)](int64_t r) {
                    return r < next.r ? A_row(next, r) : nullptr;
                },
                K,
                [&](int64_t m, int64_t r, const float* value, int64_t some) {
                    std::memcpy(sum + m * ranks + from + r, value, some * sizeof *value);
                });
            for (int64_t i = first; i < first + count; ++i)
                for (int64_t r = from; r < to; r += W) {
                    const int64_t width = std::min<int64_t>(W, to - r);
                    const F value = load_some(sum + (i - begin) * ranks + r, width);
                    store_some(h.data() + i * ranks + r, width, value);
                    if (!a.pages) store_some(h_row(i) + r, width, value);
                }
        });
    }

    X* h_row(int64_t i) const { return a.h + a.row(i) * a.ldh; }

    const T* A_row(const Slot<T>& slot, int64_t r) const {
        return slot.A_ranks ? slot.A_ranks[r] : slot.A + r * a.lda;
    }

    // The slot of grouped row i, which may be past the last one.
    Slot<T> next_slot(int64_t i) const {
        Slot<T> slot;
        if (i < M) a.segments(i, i + 1, [&](int64_t s, int64_t, int64_t) { slot = a.slot(s); });
        return slot;
    }

    // Outputs n ... n + count - 1 of grouped rows first ... first + rows - 1.
    void expand_range(int64_t first, int64_t rows, int64_t n, int64_t count) {
        float* sum = nullptr;
        if (a.weight) {
            sum = sums.get() + omp_get_thread_num() * group * outputs;
            // Products of many rows take longer than W's bytes: B comes meanwhile.
            Prefetch<T>& coming = next_B(first, rows, n, count);
            const int64_t lines = coming.lines() * NB / (rows * count) + 1;
            dots<X, X>(
                packed.get() + first / MB * packed_size<X>(K), 0, rows, count,
                [&](int64_t i) { return a.weight + (n + i) * a.ldw; },
                [&](int64_t i) {
                    return n + count + i < a.shape.N ? a.weight + (n + count + i) * a.ldw : nullptr;
                },
                K,
                [&](int64_t m, int64_t i, const float* value, int64_t some) {
                    std::memcpy(sum + m * outputs + i, value, some * sizeof *value);
                    coming.fetch(lines);
                });
        }
        a.segments(first, first + rows, [&](int64_t s, int64_t from, int64_t count_rows) {
            float* own = sum ? sum + (from - first) * outputs : nullptr;
            if (a.idle(s)) return own ? finish_plain(own, from, count_rows, n, count) : void();
            add_slot(own, s, from, count_rows, n, count);
        });
    }

    // sum: of x W^T, from row `first` on, or null.
    void add_slot(float* sum, int64_t s, int64_t first, int64_t rows, int64_t n, int64_t count) {
        Slot<T> slot = a.slot(s);
        const Slot<T> next = few ? next_slot(first + rows) : Slot<T>{};
        X** y_row = y_rows.get() + omp_get_thread_num() * group;
        float* scale = scales.get() + omp_get_thread_num() * group;
        for (int64_t i = 0; i < rows; ++i) {
            y_row[i] = a.y + a.row(first + i) * a.ldy + n;
            scale[i] = a.scale(s, first + i);
        }
        const H* from = h.data() + first * ranks;
        const auto h_row = [&](int64_t i) { return from + i * ranks; };
        const auto finish = [&](int64_t i, int64_t at, int64_t width, F delta) {
            X* y = y_row[i] + at;
            F before;
            if (sum) {
                before = based(sum + i * outputs + at, n + at, width);
            } else {
                // Its next outputs, when the other rows have had their turn.
                __builtin_prefetch(y + 2 * W, 1);
                before = load_some(y, width);
            }
            store_some(y, width, fma(delta, splat(scale[i]), before));
        };
        using Row = decltype(h_row);
        using Finish = decltype(finish);
        if (a.pages) {
            using Paged = ExpandPages<X, T, Row, Finish>;
            return Paged{slot, next, n, count, rows, h_row, finish}.run();
        }
        if (slot.B) slot.B += n * a.ldb;
        if (slot.bias) slot.bias += n;
        using Dense = Expand<X, T, Row, Finish>;
        // clang-format off
        Dense{slot, next.B ? next.B + n * a.ldb : nullptr, a.ldb, count, rows, h_row, finish,
              columns.get() + omp_get_thread_num() * columns_size()}.run();
        // clang-format on
    }

    void finish_plain(const float* sum, int64_t first, int64_t rows, int64_t n, int64_t count) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t at = 0; at < count; at += W) {
                const int64_t width = std::min<int64_t>(W, count - at);
                store_some(a.y + a.row(first + i) * a.ldy + n + at, width,
                           based(sum + i * outputs + at, n + at, width));
            }
    }

    F based(const float* sum, int64_t n, int64_t width) const {
        const F product = load_some(sum, width);
        return a.bias ? add(product, load_some(a.bias + n, width)) : product;
    }

    Prefetch<T>& next_B(int64_t first, int64_t rows, int64_t n, int64_t count) {
        Prefetch<T>& all = prefetches[omp_get_thread_num()];
        a.collect_B(all, first, rows, n, count);
        return all;
    }
};

}  // namespace fastlora::FL_ISA
