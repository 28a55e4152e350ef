// The adapter's part added to y, where no tile's rows have different adapters: nothing of x or y is
// turned round. Rows of x, as they lie, are the left operand of h = x A^T, rows of h that of h B^T;
// A and B are the right ones, packed once. The same sums as expand.h's, to the bit.
#pragma once

#include "cpu/tiles/shrink.h"

namespace fastlora::FL_ISA {

template <class T>
class AddTiles {
  public:
    // right: right_bytes(...), own: own_bytes(...) of memory, of all threads and of this one.
    AddTiles(const Chunk<T>& chunk, Tiles& tiles, char* own)
        : c(chunk), tiles(tiles), K_steps(c.plan.x_steps), rank_tiles(2 * c.plan.steps), sums(own),
          rests(sums + 12 * TILE), copies(rests + 2 * TILE) {}

    static bool can(const Plan<T>& plan) {
        for (const RowTile& tile : plan.tiles)
            if (tile.mixed) return false;
        return plan.steps > 0 && plan.steps <= 3;
    }
    static int64_t right_bytes(const Plan<T>& plan, int64_t N) {
        const int64_t A = 2 * plan.steps * plan.x_steps;
        return plan.groups * (A + divide_up(N, PANEL_N) * 2 * plan.steps) * TILE;
    }
    static int64_t own_bytes(const Plan<T>& plan) { return (14 + 2 * plan.x_steps) * TILE; }

    // A and B of a run's group as right operands: the part'th of several parts.
    void pack(const Run& run, int64_t part, int64_t parts) {
        const Segment& s = c.plan.segments[run.begin];
        if (run.begin && c.plan.segments[run.begin - 1].group == s.group) return;
        const Slot<T> slot = c.a.slot(s.slot);
        const int64_t panels = divide_up(c.a.shape.N, PANEL_N);
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p)
            for (int64_t r = 0; r < slot.r; r += STEP)
                pack_right_B(B_at(s.group, p) + r / STEP * 2 * TILE, slot, c.a.ldb, p * PANEL_N,
                             std::min(PANEL_N, c.a.shape.N - p * PANEL_N), r);
        const int64_t begin = K_steps * part / parts, end = K_steps * (part + 1) / parts;
        for (int64_t t = 0; t < rank_tiles; ++t) {
            const T* row[ROWS_A_TILE];
            const int64_t ranks = std::clamp<int64_t>(slot.r - t * ROWS_A_TILE, 0, ROWS_A_TILE);
            for (int64_t i = 0; i < ranks; ++i) row[i] = c.A_row(slot, t * ROWS_A_TILE + i);
            for (int64_t k = begin; k < end; ++k)
                pack_tile(A_at(s.group) + (k * rank_tiles + t) * TILE, row, int(ranks), k * STEP,
                          std::min(STEP, c.a.shape.K - k * STEP));
        }
    }

    // h of the rows of tiles t and t + 1: of one adapter two at a time.
    void shrink(int64_t t) {
        const int64_t both = t + 1 < int64_t(c.plan.tiles.size()) && in_pair(t);
        with_rank_tiles([&](auto count) {
            constexpr int RT = decltype(count)::value;
            if (both) return products<2, RT>(t);
            products<1, RT>(t);
            if (t + 1 < int64_t(c.plan.tiles.size())) products<1, RT>(t + 1);
        });
    }

    // The part'th outputs of tile t's rows: rows of y are read and written along.
    void expand(int64_t t, int64_t part, int64_t parts) {
        const RowTile& tile = c.plan.tiles[t];
        if (tile.begin == tile.end) return;
        const Segment& s = c.plan.segments[tile.begin];
        const int64_t panels = divide_up(c.a.shape.N, PANEL_N);
        tiles.use(TileConfig());
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
            zero_sums<1, 2>();
            steps<1, 2>({c.h + s.h, TILE_ROW, 0, TILE}, B_at(s.group, p), 2 * TILE, s.steps);
            store_sums<1, 2>(sums);
            add_rows(s, p * PANEL_N);
        }
    }

  private:
    const Chunk<T>& c;
    Tiles& tiles;
    int64_t K_steps, rank_tiles;
    char *sums, *rests, *copies;

    char* A_at(int group) const { return c.x + group * rank_tiles * K_steps * TILE; }
    char* B_at(int group, int64_t panel) const {
        const int64_t place = group * divide_up(c.a.shape.N, PANEL_N) + panel;
        return A_at(c.plan.groups) + place * c.plan.steps * 2 * TILE;
    }

    template <class Call>
    void with_rank_tiles(Call call) const {
        if (rank_tiles == 2) return call(std::integral_constant<int, 2>{});
        if (rank_tiles == 4) return call(std::integral_constant<int, 4>{});
        call(std::integral_constant<int, 6>{});
    }

    const bf16* x_row(int64_t i) const { return c.a.x + c.row(i) * c.a.ldx; }

    // Rows of a tile that lie evenly: the distance of two, or 0.
    int64_t even(int64_t t) const {
        const int64_t first = t * ROWS_A_TILE;
        const int64_t ld = c.row(first + 1) - c.row(first);
        for (int64_t i = 1; i < ROWS_A_TILE; ++i)
            if (c.row(first + i) - c.row(first) != i * ld) return 0;
        return ld * c.a.ldx * int64_t(sizeof(bf16));
    }

    bool in_pair(int64_t t) const {
        const RowTile &a = c.plan.tiles[t], &b = c.plan.tiles[t + 1];
        if (rank_tiles > 2 || b.rows < ROWS_A_TILE || a.begin == a.end || b.begin == b.end)
            return false;
        return c.plan.segments[a.begin].group == c.plan.segments[b.begin].group && even(t) &&
               even(t) == even(t + 1);
    }

    template <int NT, int RT>
    void products(int64_t t) {
        if constexpr (NT * RT <= 6) {
            const RowTile& tile = c.plan.tiles[t];
            if (tile.begin == tile.end) return;
            const Segment& s = c.plan.segments[tile.begin];
            const bf16* row[ROWS_A_TILE];
            for (int i = 0; i < tile.rows; ++i) row[i] = x_row(t * ROWS_A_TILE + i);
            const int64_t whole = c.whole(), step = RT * TILE;
            Left x = left_rows(copies, row, tile.rows, whole);
            const bf16* next = NT == 2 ? x_row((t + 1) * ROWS_A_TILE) : row[0];
            x.second = reinterpret_cast<const char*>(next) - x.p;
            tiles.use(config_of_rows(tile.rows));
            zero_sums<NT, RT>();
            steps<NT, RT>(x, A_at(s.group), step, whole);
            if (c.rest()) {
                for (int n = 0; n < NT; ++n) {
                    for (int i = 0; i < tile.rows; ++i) row[i] = x_row((t + n) * ROWS_A_TILE + i);
                    copy_rest(rests + n * TILE, row, tile.rows, whole * STEP, c.rest());
                }
                steps<NT, RT>({rests, TILE_ROW, TILE, 0}, A_at(s.group) + whole * step, step, 1);
            }
            store_sums<NT, RT>(sums);
            for (int n = 0; n < NT; ++n)
                put_h(c.plan.segments[c.plan.tiles[t + n].begin], sums + n * RT * TILE);
        }
    }

    // sum [rank tiles][rows, 16 ranks]: to h as it is saved, and scaled to a left operand.
    void put_h(const Segment& s, const char* sum) const {
        const int64_t r = c.a.slot(s.slot).r;
        for (int64_t i = 0; i < s.count; ++i) {
            const Floats by = spread(c.a.scale(s.slot, c.plan.first + s.row + i));
            for (int64_t step = 0; step < s.steps; ++step) {
                const char* from = sum + 2 * step * TILE;
                const Floats low = floats_at(from, int(i)), high = floats_at(from + TILE, int(i));
                const int64_t ranks = std::min(STEP, r - step * STEP);
                // Past a slot's ranks a row's Inf times zero is NaN.
                put_line(c.h + s.h + step * TILE + i * TILE_ROW,
                         keep_halves(narrow_both(low * by, high * by), ranks));
                if (c.wanted_h())
                    store_halves(c.a.h + c.row(s.row + i) * c.a.ldh + step * STEP, ranks,
                                 narrow_both(low, high));
            }
        }
        for (int64_t i = s.count; i < ROWS_A_TILE; ++i)
            for (int64_t step = 0; step < s.steps; ++step)
                put_line(c.h + s.h + step * TILE + i * TILE_ROW, Words{});
    }

    // sums: two tiles [rows, 16 outputs].
    void add_rows(const Segment& s, int64_t n) const {
        const int64_t width = std::min(PANEL_N, c.a.shape.N - n);
        for (int64_t i = 0; i < s.count; ++i) {
            // As with_bias().
            Floats low =
                floats_at(sums, int(i)) + (c.bias ? line_at<Floats>(c.bias + n) : Floats{});
            Floats high = floats_at(sums + TILE, int(i)) +
                          (c.bias ? line_at<Floats>(c.bias + n + LANES) : Floats{});
            bf16* y = c.a.y + c.row(s.row + i) * c.a.ldy + n;
            const Words before = load_halves(y, width);
            low += widen_half(before, 0), high += widen_half(before, 1);
            store_halves(y, width, narrow_both(low, high));
        }
    }
};

}  // namespace fastlora::FL_ISA
