// The LoRA linear of bfloat16 rows by tiles: y = x W^T + bias + s (x A^T) B^T in one pass over W,
// or the adapter's part added to y.
//
// Three phases, each spread over the threads:
//   pack    x into right operands, once
//   shrink  h = x A^T, scaled and rounded, into right operands too
//   expand  y, W's and B's rows as left operands: the ranks are further steps of the same sums
// With W as it lies nothing of it is copied but what a block keeps in a cache. One rounding of y;
// a row's bits are the same whatever the other rows, the blocks and the threads.
#pragma once

#include <cfloat>

#include "cpu/threads.h"
#include "cpu/tiles/add.h"
#include "cpu/tiles/arena.h"
#include "cpu/tiles/expand.h"

namespace fastlora::FL_ISA {

// Rows at a time: x packed, and a block's sums, stay in caches.
constexpr int64_t CHUNK = 512;

template <class T>
class TileRows {
  public:
    // Allocates; run() does not.
    explicit TileRows(const Rows<bf16, T>& rows) : a(rows) {
        for (int64_t first = 0; first < a.shape.M; first += CHUNK)
            plans.emplace_back(a, first, std::min(CHUNK, a.shape.M - first));
        if (a.bias || a.lora_bias) make_bias();
        for (int i = 0; i < a.threads; ++i)
            prefetches.emplace_back(a.pages ? a.pages->total : std::min(CHUNK, a.shape.M));
        for (const Plan<T>& plan : plans) {
            if (adds(plan)) {
                x_bytes = std::max(x_bytes, AddTiles<T>::right_bytes(plan, a.shape.N));
                own_bytes = std::max(own_bytes, AddTiles<T>::own_bytes(plan));
            }
            x_bytes = std::max(x_bytes, plan.x_bytes);
            h_bytes = std::max(h_bytes, plan.h_bytes);
            own_bytes = std::max({own_bytes, Shrink<T>::bytes(a.shape.K),
                                  ExpandTiles<T>::bytes(plan, cut(plan), a.shape.K)});
        }
        own_bytes = divide_up(own_bytes, 4096) * 4096;
        memory = arena().take(x_bytes + h_bytes + a.threads * own_bytes);
    }

    ~TileRows() { arena().trim(); }

    void run() {
        for (const Plan<T>& plan : plans) {
            const float* add = a.bias || a.lora_bias ? bias.get() : nullptr;
            run({a, plan, memory, memory + x_bytes, add});
        }
    }

  private:
    Rows<bf16, T> a;
    std::vector<Plan<T>> plans;
    Buffer<float> bias;
    std::vector<Prefetch<T>> prefetches;  // [threads]
    int64_t x_bytes = 0, h_bytes = 0, own_bytes = 0;
    char* memory;

    static Arena& arena() {
        static thread_local Arena kept;
        return kept;
    }

    // Zeros past N: whole panels are read.
    void make_bias() {
        const int64_t N = a.shape.N;
        bias = Buffer<float>(divide_up(N, PANEL_N) * PANEL_N);
        std::fill(bias.get() + N, bias.get() + divide_up(N, PANEL_N) * PANEL_N, 0.0f);
        for (int64_t n = 0; n < N; ++n) {
            bias[n] = a.bias ? widen(a.bias[n]) : 0.0f;
            if (a.lora_bias) bias[n] += a.scalings[0] * a.lora_bias[n];
            if (std::abs(bias[n]) < FLT_MIN) bias[n] = 0.0f;  // minus zero too: see with_bias()
        }
    }

    // Measured on an Intel Xeon with AMX: W of up to 192 rows is read as it lies, 64 outputs at a
    // time, and packed for more, in blocks of half the core's cache of 2 MB.
    Blocks cut(const Plan<T>& plan) const {
        const int64_t all = divide_up(a.shape.N, PANEL_N);
        if (plan.panels.size() == 1) return {std::max<int64_t>(1, all / (a.threads * 8))};
        if (!a.weight) return {4};
        const bool packed = plan.rows > 192;
        int64_t panels = !packed ? 2 : a.shape.K > 2048 ? 8 : 4;
        while (panels > 2 && all < 2 * a.threads * panels) panels /= 2;
        return {panels, packed, packed && a.shape.K > 2048 ? 2048 / STEP : 0};
    }

    // Few rows are packed sooner than A and B.
    bool adds(const Plan<T>& plan) const {
        return !a.weight && plan.rows > ROWS_A_TILE && AddTiles<T>::can(plan);
    }

    void run(const Chunk<T>& c) {
        const int64_t count = int64_t(c.plan.tiles.size());
        const int64_t parts = count < 2 * a.threads ? 8 : 1;
        std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
        {
            Tiles tiles;
            char* own = memory + x_bytes + h_bytes + omp_get_thread_num() * own_bytes;
            if (adds(c.plan))
                add(c, tiles, own);
            else
                pass(c, tiles, own, parts, next);
        }
    }

    // x packed, h, then y: what a thread does of it.
    void pass(const Chunk<T>& c, Tiles& tiles, char* own, int64_t parts,
              std::atomic<int64_t>& next) {
        const Plan<T>& plan = c.plan;
        const int64_t rank_tiles = 2 * plan.steps, runs = int64_t(plan.runs.size());
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < int64_t(plan.tiles.size()) * parts; ++i) {
            const int64_t begin = plan.x_steps * (i % parts) / parts;
            const int64_t end = plan.x_steps * (i % parts + 1) / parts;
            pack_x(c, panel_of(plan, i / parts), i / parts, begin, end);
            if (i == 0) clear_h(c);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < runs * rank_tiles; ++i) {
            const Run& run = plan.runs[i / rank_tiles];
            const int64_t r = i % rank_tiles * ROWS_A_TILE;
            if (r < a.slot(plan.segments[run.begin].slot).r) Shrink<T>(c, tiles, own).run(run, r);
        }
        Prefetch<T>& coming = prefetches[omp_get_thread_num()];
        if (a.shape.N) ExpandTiles<T>(c, tiles, coming, cut(plan), own).run(next);
    }

    void add(const Chunk<T>& c, Tiles& tiles, char* own) {
        const Plan<T>& plan = c.plan;
        AddTiles<T> work(c, tiles, own);
        constexpr int64_t parts = 8;
        const int64_t count = int64_t(plan.tiles.size());
        const int64_t N_parts = count < 4 * a.threads ? 8 : 1;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < int64_t(plan.runs.size()) * parts; ++i) {
            work.pack(plan.runs[i / parts], i % parts, parts);
            if (i == 0) clear_h(c);
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; t += 2) work.shrink(t);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * N_parts; ++i)
            work.expand(i / N_parts, i % N_parts, N_parts);
    }

    static const Panel& panel_of(const Plan<T>& plan, int64_t tile) {
        for (const Panel& panel : plan.panels)
            if (tile < panel.tile + panel.tiles) return panel;
        return plan.panels.back();
    }
};

}  // namespace fastlora::FL_ISA
