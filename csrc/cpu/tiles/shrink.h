// h = x A^T of one chunk's rows, and x packed for it: the first two phases.
#pragma once

#include "cpu/tiles/operands.h"
#include "cpu/tiles/outputs.h"

namespace fastlora::FL_ISA {

// One chunk of a call: what every thread sees.
template <class T>
struct Chunk {
    const Rows<bf16, T>& a;
    const Plan<T>& plan;
    char *x, *h;        // right operands
    const float* bias;  // [N up to whole panels], or null

    int64_t whole() const { return a.shape.K / STEP; }
    int64_t rest() const { return a.shape.K % STEP; }
    bool wanted_h() const { return a.h && !a.pages && a.shape.R; }
    int64_t row(int64_t i) const { return a.row(plan.first + i); }

    const T* A_row(const Slot<T>& slot, int64_t r) const {
        return slot.A_ranks ? slot.A_ranks[r] : slot.A + r * a.lda;
    }
};

// Steps begin ... end - 1 of one tile of x; its columns past the last row are zeros.
template <class T>
inline void pack_x(const Chunk<T>& c, const Panel& panel, int64_t tile, int64_t begin,
                   int64_t end) {
    const bf16* row[ROWS_A_TILE];
    const int rows = c.plan.tiles[tile].rows;
    for (int i = 0; i < rows; ++i) row[i] = c.a.x + c.row(tile * ROWS_A_TILE + i) * c.a.ldx;
    for (int64_t k = begin; k < end; ++k)
        pack_tile(c.x + panel.x + (k * panel.tiles + tile - panel.tile) * TILE, row, rows, k * STEP,
                  std::min(STEP, c.a.shape.K - k * STEP));
}

// Zeros where h has no rank: past a slot's own, and in rows without an adapter.
template <class T>
inline void clear_h(const Chunk<T>& c) {
    if (!c.wanted_h()) return;
    const auto& a = c.a;
    const int64_t first = c.plan.first;
    a.segments(first, first + c.plan.rows, [&](int64_t s, int64_t from, int64_t count) {
        const int64_t r = a.slot(s).r;
        for (int64_t i = from; i < from + count; ++i)
            std::fill(a.h + a.row(i) * a.ldh + r, a.h + a.row(i) * a.ldh + a.shape.R, bf16{});
    });
}

template <class T>
class Shrink {
  public:
    // scratch: bytes(K) of them.
    Shrink(const Chunk<T>& chunk, Tiles& tiles, char* scratch)
        : c(chunk), tiles(tiles), sums(scratch), A_rest(scratch + 6 * TILE),
          copy(scratch + 7 * TILE) {}

    static int64_t bytes(int64_t K) { return 7 * TILE + K / STEP * TILE; }

    // 16 ranks from r on, or what is left of them, for one slot's rows in a panel.
    void run(const Run& run, int64_t r) {
        const Panel& panel = c.plan.panels[run.panel];
        const Segment& first = c.plan.segments[run.begin];
        const Slot<T> slot = c.a.slot(first.slot);
        const int64_t ranks = std::min<int64_t>(ROWS_A_TILE, slot.r - r);
        const T* row[ROWS_A_TILE];
        for (int64_t i = 0; i < ranks; ++i) row[i] = c.A_row(slot, r + i);
        tiles.use(config_of_rows(ranks));
        const int count = c.plan.segments[run.end - 1].tile - first.tile + 1;
        const char* x = c.x + panel.x + (first.tile - panel.tile) * TILE;
        const Left A = left_rows(copy, row, ranks, c.whole());
        if (c.rest()) copy_rest(A_rest, row, ranks, c.whole() * STEP, c.rest());
        std::memset(sums, 0, count * TILE);
        with_tiles(count, [&](auto mt) { products<decltype(mt)::value>(A, x, panel.tiles); });
        for (int i = run.begin; i < run.end; ++i)
            put(c.plan.segments[i], r, ranks, sums + (c.plan.segments[i].tile - first.tile) * TILE);
    }

    // call(std::integral_constant) for 1 ... 6 tiles.
    template <class Call>
    static void with_tiles(int count, Call call) {
        if (count == 1) return call(std::integral_constant<int, 1>{});
        if (count == 2) return call(std::integral_constant<int, 2>{});
        if (count == 3) return call(std::integral_constant<int, 3>{});
        if (count == 4) return call(std::integral_constant<int, 4>{});
        if (count == 5) return call(std::integral_constant<int, 5>{});
        call(std::integral_constant<int, 6>{});
    }

  private:
    const Chunk<T>& c;
    Tiles& tiles;
    char *sums, *A_rest, *copy;

    template <int MT>
    void products(Left A, const char* x, int64_t panel_tiles) {
        const int64_t step = panel_tiles * TILE;
        zero_sums<1, MT>();
        steps<1, MT>(A, x, step, c.whole());
        if (c.rest()) steps<1, MT>(Left::rows(A_rest, TILE_ROW), x + c.whole() * step, step, 1);
        store_sums<1, MT>(sums);
    }

    // sum [ranks, rows of x]: to h as it is saved, and scaled to a right operand.
    void put(const Segment& s, int64_t r, int64_t ranks, const char* sum) {
        const int64_t first = s.row - s.tile * ROWS_A_TILE;
        float scale[LANES] = {};
        for (int64_t i = 0; i < s.count; ++i)
            scale[first + i] = c.a.scale(s.slot, c.plan.first + s.row + i);
        const Floats by = line_at<Floats>(scale);
        char* to = c.h + s.h + r / STEP * TILE + r % STEP / 2 * TILE_ROW;
        Words saved[16] = {};
        for (int i = 0; i < 8; ++i) {
            const Floats even = floats_at(sum, 2 * i), odd = floats_at(sum, 2 * i + 1);
            saved[i] = pair(even, odd);
            // Past a slot's ranks Inf times zero is NaN.
            const Floats low = 2 * i < ranks ? even * by : Floats{};
            const Floats high = 2 * i + 1 < ranks ? odd * by : Floats{};
            put_line(to + i * TILE_ROW, keep_lanes(pair(low, high), s.columns));
        }
        // Ranks that would be the other half of a step are not there.
        if (r % STEP == 0 && r + ROWS_A_TILE >= c.a.slot(s.slot).r)
            std::memset(to + 8 * TILE_ROW, 0, 8 * TILE_ROW);
        if (!c.wanted_h()) return;
        transpose(saved);
        for (int64_t i = 0; i < s.count; ++i)
            store_halves(c.a.h + c.row(s.row + i) * c.a.ldh + r, ranks, saved[first + i]);
    }
};

}  // namespace fastlora::FL_ISA
