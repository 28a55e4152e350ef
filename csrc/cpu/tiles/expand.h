// y of one chunk's rows: panels of 32 outputs by panels of rows, the third phase.
//
// One panel of rows streams W by; of several, a block of W's rows passes by all of them: read once
// from memory, and for many of them packed as tiles by the first (rows 4096 bytes apart otherwise
// meet in one set of the cache).
#pragma once

#include <atomic>

#include "cpu/tiles/panel_sums.h"

namespace fastlora::FL_ISA {

template <class T>
class ExpandTiles {
  public:
    // scratch: bytes(...) of them.
    ExpandTiles(const Chunk<T>& chunk, Tiles& tiles, Prefetch<T>& coming, Blocks blocks,
                char* scratch)
        : c(chunk), coming(coming), blocks(blocks), sums(scratch),
          packed(sums + sums_bytes(c.plan, blocks) + PanelSums<T>::bytes(c.plan, blocks)),
          panel_sums(chunk, tiles, blocks, sums + sums_bytes(c.plan, blocks)),
          steps_of_W(panel_sums.all_steps()) {
        std::memset(sums, 0, sums_bytes(c.plan, blocks));
    }

    static int64_t bytes(const Plan<T>& plan, Blocks blocks, int64_t K) {
        const int64_t W = blocks.packed ? K / STEP * 2 * TILE * blocks.panels : 0;
        return sums_bytes(plan, blocks) + PanelSums<T>::bytes(plan, blocks) + W;
    }

    void run(std::atomic<int64_t>& next) {
        if (c.plan.panels.size() == 1)
            Shrink<T>::with_tiles(c.plan.panels[0].tiles, [&](auto mt) {
                stream<decltype(mt)::value>(c.plan.panels[0], next);
            });
        else
            for (int64_t at; (at = next.fetch_add(1)) * blocks.panels * PANEL_N < c.a.shape.N;)
                block(at * blocks.panels * PANEL_N);
    }

  private:
    using Outputs = typename PanelSums<T>::Outputs;

    const Chunk<T>& c;
    Prefetch<T>& coming;
    Blocks blocks;
    char *sums, *packed;
    PanelSums<T> panel_sums;
    int64_t steps_of_W;

    // Two sets for a stream, else one a panel of outputs; where K is cut, of each panel of rows.
    static int64_t sums_bytes(const Plan<T>& plan, Blocks blocks) {
        const int64_t panels = blocks.steps ? int64_t(plan.panels.size()) : 1;
        return TILE * std::max<int64_t>(24, 6 * blocks.panels * panels);
    }
    // Tile m of a panel of rows, sums [2][MT].
    void put(const Panel& panel, const Outputs& o, const char* from, int m) const {
        const RowTile& tile = c.plan.tiles[panel.tile + m];
        const char* const pair[2] = {from + m * TILE, from + (panel.tiles + m) * TILE};
        const float* bias = c.bias ? c.bias + o.n : nullptr;
        const int64_t first = int64_t(panel.tile + m) * ROWS_A_TILE;
        const auto y_row = [&](int64_t i) { return c.a.y + c.row(first + i) * c.a.ldy + o.n; };
        if (c.a.weight) return put_outputs(pair, bias, tile.rows, o.rows, y_row);
        uint32_t changed = 0;
        for (int i = tile.begin; i < tile.end; ++i) changed |= c.plan.segments[i].columns;
        if (changed) add_outputs(pair, bias, changed, o.rows, y_row);
    }

    // One panel of rows: W streams by. A panel's outputs are written while the next one's first
    // steps are under way, the starts of its rows and its B are fetched by the one before.
    template <int MT>
    void stream(const Panel& panel, std::atomic<int64_t>& next) {
        const int64_t all = divide_up(c.a.shape.N, PANEL_N), each = blocks.panels;
        const int64_t lines_a_step = 2;
        Outputs before{};
        int which = 0;
        const auto write = [&] {
            for (int m = 0; before.rows && m < MT; ++m)
                put(panel, before, sums + (which ^ 1) * 12 * TILE, m);
        };
        for (int64_t task = next.fetch_add(1); task * each < all;) {
            const int64_t coming_task = next.fetch_add(1);
            for (int64_t p = task * each; p < std::min(all, (task + 1) * each); ++p) {
                const Outputs o = panel_sums.outputs_at(p * PANEL_N, 0);
                const int64_t after = p + 1 < (task + 1) * each ? p + 1 : coming_task * each;
                const bool last = after >= all;
                const Outputs then = panel_sums.outputs_at(last ? o.n : after * PANEL_N, 0);
                int64_t B_lines = 0;
                if (!last && panel.mixed) {
                    c.a.collect_B(coming, c.plan.first, c.plan.rows, then.n, then.rows);
                    B_lines = coming.lines() / std::max<int64_t>(1, steps_of_W) + 1;
                }
                const int64_t from = steps_of_W - PANEL_N / lines_a_step;
                const auto fetch = [&](int64_t k, int n) {
                    if (n || last) return;
                    coming.fetch(B_lines);
                    for (int64_t i = 0; k >= from && i < lines_a_step; ++i) {
                        const int64_t row = (k - from) * lines_a_step + i;
                        if (row >= then.rows) break;
                        const char* start = then.W.p + row * then.W.stride;
                        for (int line = 0; line < 4; ++line)
                            __builtin_prefetch(start + line * TILE_ROW);
                    }
                };
                const auto between = [&] {
                    write();
                    panel_sums.forget_copies();
                    panel_sums.copy_operands(panel, o);
                };
                panel_sums.template products<MT>(panel, o, sums + which * 12 * TILE, between,
                                                 fetch);
                before = o;
                which ^= 1;
            }
            task = coming_task;
        }
        write();
    }

    // All panels of rows by a block of outputs from n on.
    void block(int64_t n) {
        panel_sums.forget_copies();
        const int64_t count =
            divide_up(std::min(blocks.panels * PANEL_N, c.a.shape.N - n), PANEL_N);
        const int64_t cut = blocks.steps ? blocks.steps : std::max<int64_t>(1, steps_of_W);
        for (int64_t begin = 0; begin == 0 || begin < steps_of_W; begin += cut)
            for (size_t i = 0; i < c.plan.panels.size(); ++i) {
                const Panel& panel = c.plan.panels[i];
                if (!c.a.weight && panel.begin == panel.end) continue;
                const int64_t end = std::min(begin + cut, steps_of_W);
                char* to = sums + (blocks.steps ? i * count * 6 * TILE : 0);
                Shrink<T>::with_tiles(panel.tiles, [&](auto mt) {
                    if constexpr (decltype(mt)::value <= 3)
                        for (int64_t at = 0; at < count; ++at)
                            block_panel<decltype(mt)::value>(i, n, at, count, begin, end,
                                                             to + at * 6 * TILE);
                });
                for (int m = 0; end == steps_of_W && m < panel.tiles; ++m)
                    for (int64_t at = 0; at < count; ++at)
                        put(panel, panel_sums.outputs_at(n + at * PANEL_N, at), to + at * 6 * TILE,
                            m);
            }
    }

    template <int MT>
    void block_panel(size_t i, int64_t n, int64_t at, int64_t count, int64_t begin, int64_t end,
                     char* to) {
        const Panel& panel = c.plan.panels[i];
        Outputs o = panel_sums.outputs_at(n + at * PANEL_N, at);
        o.begin = begin, o.end = end;
        if (end == steps_of_W) panel_sums.copy_operands(panel, o);
        char* W = packed + at * steps_of_W * 2 * TILE;
        if (blocks.packed && o.rows == PANEL_N && i == 0)
            return panel_sums.template products<MT>(
                panel, o, to, [] {},
                [&](int64_t k, int n) {
                    tile_store<LEFT>(W + (2 * (begin + k) + n) * TILE, TILE_ROW);
                });
        if (blocks.packed && o.rows == PANEL_N) o.W = Left::packed(W);
        // The next panel of x comes closer meanwhile.
        const Panel* then = i + 1 < c.plan.panels.size() ? &c.plan.panels[i + 1] : nullptr;
        const int64_t lines = then ? then->tiles * 16 : 0, each = divide_up(lines, count);
        const char* x = !then ? nullptr
                              : c.x + then->x + begin * then->tiles * TILE +
                                    at * each * (end - begin) * TILE_ROW;
        panel_sums.template products<MT>(
            panel, o, to, [] {},
            [&](int64_t, int n) {
                if (n) return;
                for (int64_t i = 0; i < each; ++i, x += TILE_ROW) __builtin_prefetch(x, 0, 2);
            });
    }
};

}  // namespace fastlora::FL_ISA
