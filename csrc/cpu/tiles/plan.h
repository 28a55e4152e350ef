// Which rows of x share a tile, and which adapter each of them has.
//
// Rows, grouped by adapter, are cut into tiles of 16 and tiles into panels that pass by a part of W
// together. A segment is an adapter's rows within one tile: its h has a tile of its own, zero in
// the columns of other rows, so that several adapters add to one tile of sums.
#pragma once

#include <vector>

#include "cpu/linear/rows.h"
#include "cpu/tiles/lanes.h"
#include "cpu/tiles/tile.h"

namespace fastlora::FL_ISA {

constexpr int64_t STEP = 32;     // k, or ranks, a step
constexpr int64_t PANEL_N = 32;  // outputs of two left tiles

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Segment {
    int64_t slot, row, count;  // rows of the chunk
    int tile, group;           // group: how many other slots came before this one
    uint32_t columns;
    int64_t steps, h;  // steps of ranks; where their tiles of h lie, in bytes
};

struct RowTile {
    int rows, begin, end;  // segments
    bool mixed;            // rows of several adapters, or of one and of none
};

struct Panel {
    int tile, tiles, begin, end;  // segments
    int64_t x;                    // where it lies, in bytes
    int groups;                   // of different slots
    bool mixed;
};

// Segments of one slot in one panel: they are neighbours, and share the products with A.
struct Run {
    int panel, begin, end;
};

template <class T>
class Plan {
  public:
    Plan(const Rows<bf16, T>& a, int64_t first, int64_t rows)
        : first(first), rows(rows), x_steps(divide_up(a.shape.K, STEP)) {
        for (int64_t i = 0; i < rows; i += ROWS_A_TILE)
            tiles.push_back({int(std::min<int64_t>(ROWS_A_TILE, rows - i)), 0, 0, false});
        a.segments(first, first + rows, [&](int64_t s, int64_t from, int64_t count) {
            if (!a.idle(s)) add(s, a.slot(s), from - first, count);
        });
        finish_tiles();
        cut_panels();
        same_rank = in_place(a);
    }

    int64_t first, rows, x_steps;
    std::vector<RowTile> tiles;
    std::vector<Segment> segments;
    std::vector<Panel> panels;
    std::vector<Run> runs;
    int64_t h_bytes = 0, x_bytes = 0, steps = 0;  // steps: most that a segment has
    int groups = 0, most_groups = 0;              // in all, in one panel
    // The rank that B's rows can be read in place with, or 0: they are copied.
    int64_t same_rank = 0;

  private:
    void add(int64_t s, const Slot<T>& slot, int64_t from, int64_t count) {
        const int64_t own = divide_up(slot.r, STEP);
        steps = std::max(steps, own);
        for (int64_t i = from; i < from + count;) {
            const int64_t tile = i / ROWS_A_TILE, begin = i % ROWS_A_TILE;
            const int64_t n = std::min(from + count - i, ROWS_A_TILE - begin);
            const uint32_t columns = ((1u << n) - 1) << begin;
            segments.push_back({s, i, n, int(tile), groups, columns, own, h_bytes});
            h_bytes += own * TILE;
            i += n;
        }
        ++groups;
    }

    void finish_tiles() {
        int at = 0;
        const int all = int(segments.size());
        for (int t = 0; t < int(tiles.size()); ++t) {
            tiles[t].begin = at;
            while (at < all && segments[at].tile == t) ++at;
            tiles[t].end = at;
            const int count = at - tiles[t].begin;
            tiles[t].mixed = count > 1 || (count == 1 && segments[at - 1].count < tiles[t].rows);
        }
    }

    // Up to six tiles take one pass over W together, more of them three at a time. Of mixed tiles
    // two: registers are left for B as it lies.
    int panel_size(int t) const {
        const int left = int(tiles.size()) - t;
        const auto mixed = [&](int count) {
            for (int i = t; i < t + std::min(count, left); ++i)
                if (tiles[i].mixed) return true;
            return false;
        };
        if (t == 0 && left <= 6 && !mixed(left)) return left;
        if (mixed(3)) return std::min(left, 2);
        return left == 4 ? 2 : std::min(left, 3);
    }

    void cut_panels() {
        for (int t = 0; t < int(tiles.size());) {
            const int size = panel_size(t);
            Panel panel{t, size, tiles[t].begin, tiles[t + size - 1].end, x_bytes, 0, false};
            for (int i = panel.begin; i < panel.end; ++i)
                if (i == panel.begin || segments[i].group != segments[i - 1].group) {
                    ++panel.groups;
                    runs.push_back({int(panels.size()), i, i + 1});
                } else {
                    ++runs.back().end;
                }
            for (int i = t; i < t + size; ++i) panel.mixed |= tiles[i].mixed;
            most_groups = std::max(most_groups, panel.groups);
            panels.push_back(panel);
            x_bytes += x_steps * size * TILE;
            t += size;
        }
    }

    int64_t in_place(const Rows<bf16, T>& a) const {
        if (!std::is_same_v<T, bf16> || a.pages || segments.empty()) return 0;
        const int64_t r = a.slot(segments[0].slot).r;
        for (const Segment& s : segments)
            if (a.slot(s.slot).r != r) return 0;
        return r > 0 && r <= STEP && r % 2 == 0 ? r : 0;
    }
};

}  // namespace fastlora::FL_ISA
