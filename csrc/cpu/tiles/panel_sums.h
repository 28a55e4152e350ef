// Sums of one panel of 32 outputs by one panel of rows: W's steps, then K's rest and the ranks onto
// the same registers.
#pragma once

#include "cpu/tiles/shrink.h"

namespace fastlora::FL_ISA {

// How the outputs, and K, are cut.
struct Blocks {
    int64_t panels = 1;   // of outputs a task
    bool packed = false;  // W copied as tiles by the first panel of rows
    int64_t steps = 0;    // of K before the next panel of rows takes its turn; 0: all
};

template <class T>
class PanelSums {
  public:
    // scratch: bytes(...) of them.
    PanelSums(const Chunk<T>& chunk, Tiles& tiles, Blocks blocks, char* scratch)
        : c(chunk), tiles(tiles), steps_of_W(c.a.weight ? c.whole() : 0),
          rest(c.a.weight ? c.rest() : 0), spare(scratch), W_rest(spare + 13 * TILE),
          B_copies(W_rest + 2 * TILE * blocks.panels), places(blocks.panels * c.plan.most_groups),
          made(reinterpret_cast<int*>(B_copies + places * c.plan.steps * 2 * TILE)) {
        forget_copies();
    }

    static int64_t bytes(const Plan<T>& plan, Blocks blocks) {
        const int64_t places = blocks.panels * plan.most_groups;
        return (13 + 2 * blocks.panels + places * plan.steps * 2) * TILE +
               divide_up(places * int64_t(sizeof(int)), TILE) * TILE;
    }

    int64_t all_steps() const { return steps_of_W; }

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

    // What was copied for other outputs is not taken again.
    void forget_copies() { std::fill(made, made + places, -1); }

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

  private:
    const Chunk<T>& c;
    Tiles& tiles;
    int64_t steps_of_W, rest;
    char *spare, *W_rest, *B_copies;
    int64_t places;
    int* made;  // [panels, most_groups]: the group whose B lies there

    bool reads_B_in_place(const Panel& panel, const Outputs& o) const {
        return c.plan.same_rank && panel.tiles <= 2 && o.rows == PANEL_N;
    }

    char* B_copy(int group, int64_t at) const {
        const int64_t place = at * c.plan.most_groups + group % c.plan.most_groups;
        return B_copies + place * c.plan.steps * 2 * TILE;
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
};

}  // namespace fastlora::FL_ISA
