// y of one chunk's rows: panels of 32 outputs by panels of rows, the third phase.
//
// W's steps, then K's rest and the ranks onto the same sums. One panel of rows streams W by; of
// several, a block of W's rows passes by all of them: read once from memory, and for many of them
// packed as tiles by the first (rows 4096 bytes apart otherwise meet in one set of the cache).
#pragma once

#include <atomic>

#include "cpu/tiles/shrink.h"

namespace fastlora::FL_ISA {

// How the outputs, and K, are cut.
struct Blocks {
    int64_t panels = 1;   // of outputs a task
    bool packed = false;  // W copied as tiles by the first panel of rows
    int64_t steps = 0;    // of K before the next panel of rows takes its turn; 0: all
};

template <class T>
class ExpandTiles {
  public:
    // scratch: bytes(...) of them.
    ExpandTiles(const Chunk<T>& chunk, Tiles& tiles, Prefetch<T>& coming, Blocks blocks,
                char* scratch)
        : c(chunk), tiles(tiles), coming(coming), blocks(blocks),
          steps_of_W(c.a.weight ? c.whole() : 0), rest(c.a.weight ? c.rest() : 0) {
        sums = scratch;
        spare = sums + sums_bytes(c.plan, blocks);
        W_rest = spare + 13 * TILE;
        B_copies = W_rest + 2 * TILE * blocks.panels;
        packed = B_copies + B_bytes(c.plan, blocks);
        std::memset(sums, 0, sums_bytes(c.plan, blocks));
        made.assign(blocks.panels * std::max(1, c.plan.most_groups), -1);
    }

    static int64_t bytes(const Plan<T>& plan, Blocks blocks, int64_t K) {
        const int64_t W = blocks.packed ? K / STEP * 2 * TILE * blocks.panels : 0;
        return sums_bytes(plan, blocks) + 13 * TILE + 2 * TILE * blocks.panels +
               B_bytes(plan, blocks) + W;
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
    const Chunk<T>& c;
    Tiles& tiles;
    Prefetch<T>& coming;
    Blocks blocks;
    int64_t steps_of_W, rest;
    char *sums, *spare, *W_rest, *B_copies, *packed;
    std::vector<int> made;  // [panels, most_groups]: the group whose B lies there

    // Two sets for a stream, else one a panel of outputs; where K is cut, of each panel of rows.
    static int64_t sums_bytes(const Plan<T>& plan, Blocks blocks) {
        const int64_t panels = blocks.steps ? int64_t(plan.panels.size()) : 1;
        return TILE * std::max<int64_t>(24, 6 * blocks.panels * panels);
    }
    static int64_t B_bytes(const Plan<T>& plan, Blocks blocks) {
        return blocks.panels * plan.most_groups * plan.steps * 2 * TILE;
    }

    // A panel of outputs, n its first one, `at` its place in a block; and steps of K.
    struct Outputs {
        int64_t n, rows, at;
        Left W;
        int64_t begin, end;
    };

    Outputs outputs_at(int64_t n, int64_t at) const {
        const bf16* W = c.a.weight ? c.a.weight + n * c.a.ldw : nullptr;
        return {n,         std::min(PANEL_N, c.a.shape.N - n), at, Left::rows(W, 2 * c.a.ldw), 0,
                steps_of_W};
    }

    bool reads_B_in_place(const Panel& panel, const Outputs& o) const {
        return c.plan.same_rank && panel.tiles <= 2 && o.rows == PANEL_N;
    }

    char* B_copy(int group, int64_t at) const {
        const int64_t place = at * c.plan.most_groups + group % c.plan.most_groups;
        return B_copies + place * c.plan.steps * 2 * TILE;
    }

    // K's rest of W and every slot's B, for one panel of outputs.
    void copy_operands(const Panel& panel, const Outputs& o) {
        if (rest) {
            const bf16* row[PANEL_N];
            for (int64_t i = 0; i < o.rows; ++i) row[i] = c.a.weight + (o.n + i) * c.a.ldw;
            for (int64_t half = 0; half * 16 < o.rows; ++half)
                copy_rest(W_rest + (2 * o.at + half) * TILE, row + half * 16,
                          std::min<int64_t>(16, o.rows - half * 16), c.whole() * STEP, rest);
        }
        if (reads_B_in_place(panel, o)) return;
        for (int i = panel.begin; i < panel.end; ++i) {
            const Segment& s = c.plan.segments[i];
            int& there = made[o.at * c.plan.most_groups + s.group % c.plan.most_groups];
            if (there == s.group) continue;
            there = s.group;
            copy_B(B_copy(s.group, o.at), c.a.slot(s.slot), c.a.ldb, o.n, o.rows);
        }
    }

    // W's steps of one or two left tiles onto fresh sums, or onto those of the steps before.
    // between() runs while the first are under way and must not touch registers; after(k, n) as in
    // steps().
    template <int NT, int MT, class Between, class After>
    void base(const Panel& panel, const Outputs& o, int half, const char* sums, Between between,
              After after) {
        constexpr int64_t step = MT * TILE;
        const char* x = c.x + panel.x + o.begin * step;
        const int64_t count = o.end - o.begin, begun = std::min<int64_t>(8, count);
        const Left W = o.W.half(half).from(o.begin);
        if (o.begin)
            load_sums<NT, MT>(sums);
        else
            zero_sums<NT, MT>();
        steps<NT, MT>(W, x, step, begun, after);
        between();
        steps<NT, MT>(W.from(begun), x + begun * step, step, count - begun,
                      [&](int64_t k, int n) { after(k + begun, n); });
        if (rest && o.end == steps_of_W) {
            const char* left = W_rest + (2 * o.at + half) * TILE;
            steps<NT, MT>({left, TILE_ROW, TILE, 0}, x + count * step, step, 1);
        }
    }

    template <int NT, int MT, int M>
    void add_ranks_of(const Panel& panel, const Outputs& o, int half) {
        const RowTile& tile = c.plan.tiles[panel.tile + M];
        for (int i = tile.begin; i < tile.end; ++i) add_segment<NT, MT, M>(panel, o, half, i);
    }

    template <int NT, int MT, int M>
    void add_segment(const Panel& panel, const Outputs& o, int half, int i) {
        const Segment& s = c.plan.segments[i];
        if constexpr (std::is_same_v<T, bf16> && NT == 2 && MT <= 2)
            if (reads_B_in_place(panel, o)) {
                const auto* B = c.a.slot(s.slot).B + o.n * c.a.ldb;
                return rank_step_in_place<MT, M>(reinterpret_cast<const char*>(B), 2 * c.a.ldb,
                                                 c.h + s.h);
            }
        const char* B = B_copy(s.group, o.at) + half * TILE;
        for (int64_t r = 0; r < s.steps; ++r)
            rank_step<NT, MT, M>({B + r * 2 * TILE, TILE_ROW, TILE, 0}, c.h + s.h + r * TILE);
    }

    template <int NT, int MT, int... M>
    void add_ranks(const Panel& panel, const Outputs& o, int half,
                   std::integer_sequence<int, M...>) {
        (add_ranks_of<NT, MT, M>(panel, o, half), ...);
    }

    // Sums [2][MT] of one panel by the other.
    template <int MT, class Between, class After>
    void products(const Panel& panel, const Outputs& o, char* to, Between between, After after) {
        constexpr auto all = std::make_integer_sequence<int, MT>();
        if constexpr (MT <= 3) {
            if (o.rows == PANEL_N) {
                const int64_t ranks = reads_B_in_place(panel, o) ? c.plan.same_rank : 0;
                tiles.use(ranks ? config_of_ranks(ranks) : TileConfig());
                base<2, MT>(panel, o, 0, to, between, after);
                if (o.end == steps_of_W) add_ranks<2, MT>(panel, o, 0, all);
                store_sums<2, MT>(to);
                return separate<MT>(panel, o, to);
            }
        }
        for (int half = 0; half * 16 < o.rows; ++half) {
            tiles.use(config_of_rows(std::min<int64_t>(16, o.rows - half * 16)));
            const auto once = [&] { return half ? void() : between(); };
            base<1, MT>(panel, o, half, to + half * MT * TILE, once, after);
            if (o.end == steps_of_W) add_ranks<1, MT>(panel, o, half, all);
            store_sums<1, MT>(to + half * MT * TILE);
        }
        separate<MT>(panel, o, to);
    }

    // In a mixed tile an adapter's Inf or NaN times another row's zero is NaN: where there is one,
    // each adapter's rows are summed apart.
    template <int MT>
    void separate(const Panel& panel, const Outputs& o, char* to) {
        if (!panel.mixed || o.end < steps_of_W) return;
        for (int m = 0; m < MT; ++m) {
            const char* const pair[2] = {to + m * TILE, to + (MT + m) * TILE};
            if (c.plan.tiles[panel.tile + m].mixed && !finite_sums(pair, o.rows))
                sum_apart<MT>(panel, o, to, m);
        }
    }

    template <int MT>
    void sum_apart(const Panel& panel, const Outputs& o, char* to, int m) {
        const RowTile& tile = c.plan.tiles[panel.tile + m];
        const Outputs whole = outputs_at(o.n, o.at);
        // Reading B in place, it was not copied.
        const bool copied = !reads_B_in_place(panel, o);
        for (int half = 0; half * 16 < o.rows; ++half) {
            tiles.use(config_of_rows(std::min<int64_t>(16, o.rows - half * 16)));
            base<1, MT>(panel, whole, half, spare, [] {}, [](int64_t, int) {});
            store_sums<1, MT>(spare);
            char *own = spare + MT * TILE, *mine = to + (half * MT + m) * TILE;
            take_columns(mine, spare + m * TILE, 0xffff);
            for (int i = tile.begin; i < tile.end; ++i) {
                const Segment& s = c.plan.segments[i];
                if (!copied) copy_B(B_copy(s.group, o.at), c.a.slot(s.slot), c.a.ldb, o.n, o.rows);
                tile_load<0>(spare + m * TILE, TILE_ROW);
                for (int64_t r = 0; r < s.steps; ++r) {
                    const char* B = B_copy(s.group, o.at) + half * TILE + r * 2 * TILE;
                    rank_step<1, 1, 0>({B, TILE_ROW, TILE, 0}, c.h + s.h + r * TILE);
                }
                tile_store<0>(own, TILE_ROW);
                take_columns(mine, own, s.columns);
            }
        }
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
                const Outputs o = outputs_at(p * PANEL_N, 0);
                const int64_t after = p + 1 < (task + 1) * each ? p + 1 : coming_task * each;
                const bool last = after >= all;
                const Outputs then = outputs_at(last ? o.n : after * PANEL_N, 0);
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
                    std::fill(made.begin(), made.end(), -1);
                    copy_operands(panel, o);
                };
                products<MT>(panel, o, sums + which * 12 * TILE, between, fetch);
                before = o;
                which ^= 1;
            }
            task = coming_task;
        }
        write();
    }

    // All panels of rows by a block of outputs from n on.
    void block(int64_t n) {
        std::fill(made.begin(), made.end(), -1);
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
                        put(panel, outputs_at(n + at * PANEL_N, at), to + at * 6 * TILE, m);
            }
    }

    template <int MT>
    void block_panel(size_t i, int64_t n, int64_t at, int64_t count, int64_t begin, int64_t end,
                     char* to) {
        const Panel& panel = c.plan.panels[i];
        Outputs o = outputs_at(n + at * PANEL_N, at);
        o.begin = begin, o.end = end;
        if (end == steps_of_W) copy_operands(panel, o);
        char* W = packed + at * steps_of_W * 2 * TILE;
        if (blocks.packed && o.rows == PANEL_N && i == 0)
            return products<MT>(
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
        products<MT>(
            panel, o, to, [] {},
            [&](int64_t, int n) {
                if (n) return;
                for (int64_t i = 0; i < each; ++i, x += TILE_ROW) __builtin_prefetch(x, 0, 2);
            });
    }
};

}  // namespace fastlora::FL_ISA
