// What tiles are loaded from: x packed, and the parts of A, B and W that do not fill a tile copied.
#pragma once

#include <type_traits>

#include "cpu/tiles/plan.h"
#include "cpu/tiles/steps.h"

namespace fastlora::FL_ISA {

// Up to 16 rows of x for one step, as pairs along k: out [16 pairs, 16 rows] words.
template <class T>
inline void pack_tile(char* out, const T* const* row, int rows, int64_t k, int64_t count) {
    if (rows == 1) {
        uint32_t pairs[LANES];
        put_line(pairs, load_halves(row[0] + k, count));
        for (int i = 0; i < LANES; ++i) put_line(out + i * TILE_ROW, Words{pairs[i]});
        return;
    }
    Words line[16] = {};
    for (int i = 0; i < rows; ++i) line[i] = load_halves(row[i] + k, count);
    transpose(line);
    for (int i = 0; i < 16; ++i) put_line(out + i * TILE_ROW, line[i]);
}

// The last k of W's (or A's) rows, which do not fill a step, for 16 rows: zeros behind them.
template <class T>
inline void copy_rest(char* out, const T* const* row, int64_t rows, int64_t k, int64_t count) {
    for (int64_t i = 0; i < ROWS_A_TILE; ++i)
        put_line(out + i * TILE_ROW, i < rows ? load_halves(row[i] + k, count) : Words{});
}

// B's rows n ... n + 31, of which `rows` are there, with zeros past a slot's rank:
// out [steps][2][16 rows] lines.
template <class T>
inline void copy_B(char* out, const Slot<T>& slot, int64_t ldb, int64_t n, int64_t rows) {
    for (int64_t r = 0; r < slot.r; r += STEP, out += 2 * TILE) {
        const int64_t ranks = std::min(STEP, slot.r - r);
        if (!slot.B_ranks) {
            for (int64_t i = 0; i < PANEL_N; ++i) {
                const bool there = i < rows;
                put_line(out + i * TILE_ROW,
                         there ? load_halves(slot.B + (n + i) * ldb + r, ranks) : Words{});
            }
            continue;
        }
        // Outputs lie side by side: pairs of ranks, then a row for each output.
        Words half[2][16] = {};
        for (int64_t i = 0; i < ranks; i += 2) {
            const T* const* rank = slot.B_ranks + r + i;
            const Words odd = i + 1 < ranks ? load_halves(rank[1] + n, rows) : Words{};
            Words both[2];
            zip(both, load_halves(rank[0] + n, rows), odd);
            half[0][i / 2] = both[0];
            half[1][i / 2] = both[1];
        }
        for (int h = 0; h < 2; ++h) {
            transpose(half[h]);
            for (int i = 0; i < 16; ++i) put_line(out + h * TILE + i * TILE_ROW, half[h][i]);
        }
    }
}

// Ranks r ... r + 31 of B's rows n ... n + 31 as right operands: out [2][16 pairs, 16 outputs] words.
template <class T>
inline void pack_right_B(char* out, const Slot<T>& slot, int64_t ldb, int64_t n, int64_t rows,
                         int64_t r) {
    const int64_t ranks = std::min(STEP, slot.r - r);
    if (!slot.B_ranks) {
        for (int64_t half = 0; half < 2; ++half) {
            const T* row[ROWS_A_TILE];
            const int64_t some = std::clamp<int64_t>(rows - half * 16, 0, 16);
            for (int64_t i = 0; i < some; ++i) row[i] = slot.B + (n + half * 16 + i) * ldb;
            pack_tile(out + half * TILE, row, int(some), r, ranks);
        }
        return;
    }
    for (int64_t i = 0; i < STEP; i += 2) {
        const T* const* rank = slot.B_ranks + r + i;
        const Words even = i < ranks ? load_halves(rank[0] + n, rows) : Words{};
        const Words odd = i + 1 < ranks ? load_halves(rank[1] + n, rows) : Words{};
        Words both[2];
        zip(both, even, odd);
        put_line(out + i / 2 * TILE_ROW, both[0]);
        put_line(out + TILE + i / 2 * TILE_ROW, both[1]);
    }
}

// Up to 16 rows of A, or of x, as a left operand: as they lie where they can be, else copied to `scratch`
// [16, whole steps of K].
template <class T>
inline Left left_rows(char* scratch, const T* const* row, int64_t rows, int64_t whole) {
    const char* start = reinterpret_cast<const char*>(row[0]);
    if constexpr (std::is_same_v<T, bf16>) {
        const int64_t stride = rows > 1 ? reinterpret_cast<const char*>(row[1]) - start : TILE_ROW;
        bool even = true;
        for (int64_t i = 1; i < rows; ++i)
            even &= reinterpret_cast<const char*>(row[i]) - start == i * stride;
        if (even) return Left::rows(start, stride);
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < whole; ++k)
            put_line(scratch + (i * whole + k) * TILE_ROW, load_halves(row[i] + k * STEP, STEP));
    return Left::rows(scratch, whole * TILE_ROW);
}

}  // namespace fastlora::FL_ISA
