// Sums of tiles, [outputs, rows of x], rounded once and written to rows of y.
#pragma once

#include "cpu/tiles/plan.h"

namespace fastlora::FL_ISA {

inline Floats floats_at(const char* c, int line) { return line_at<Floats>(c + line * TILE_ROW); }

// Of a sum that was flushed to minus zero what other adapters' zeros would make of it: plus zero.
inline Floats with_bias(Floats sum, const float* bias) { return sum + spread(bias ? *bias : 0.0f); }

// bias [32] or null; c[2]: two tiles, of 16 outputs each. To rows y_row(i) of 32 outputs, of which
// `width` are there.
template <class Row>
inline void put_outputs(const char* const c[2], const float* bias, int rows, int64_t width,
                        Row y_row) {
    Words line[16];
    for (int i = 0; i < 16; ++i) {
        const char* tile = c[i / 8];
        const Floats even = floats_at(tile, i % 8 * 2), odd = floats_at(tile, i % 8 * 2 + 1);
        line[i] = pair(with_bias(even, bias ? bias + 2 * i : nullptr),
                       with_bias(odd, bias ? bias + 2 * i + 1 : nullptr));
    }
    transpose(line);
    if (rows == ROWS_A_TILE && width == PANEL_N)
        for (int i = 0; i < 16; ++i) put_line(y_row(i), line[i]);
    else
        for (int i = 0; i < rows; ++i) store_halves(y_row(i), width, line[i]);
}

// The same added to what y holds, for the rows in `changed`.
template <class Row>
inline void add_outputs(const char* const c[2], const float* bias, uint32_t changed, int64_t width,
                        Row y_row) {
    Words half[2][16];
    for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 16; ++i)
            half[h][i] = (Words)with_bias(floats_at(c[h], i), bias ? bias + h * 16 + i : nullptr);
        transpose(half[h]);
    }
    for (int i = 0; i < ROWS_A_TILE; ++i) {
        if (!(changed >> i & 1)) continue;
        bf16* y = y_row(i);
        const Words before = load_halves(y, width);
        const Floats low = widen_half(before, 0) + (Floats)half[0][i];
        const Floats high = widen_half(before, 1) + (Floats)half[1][i];
        store_halves(y, width, narrow_both(low, high));
    }
}

// Whether the sums of two tiles are all finite, of `outputs` outputs.
inline bool finite_sums(const char* const c[2], int64_t outputs) {
    for (int64_t n = 0; n < outputs; ++n)
        if (!all_finite(floats_at(c[n / 16], int(n % 16)))) return false;
    return true;
}

// Takes the columns in mask from other sums.
inline void take_columns(char* c, const char* from, uint32_t mask) {
    for (int i = 0; i < 16; ++i) {
        float to[LANES], own[LANES];
        std::memcpy(to, c + i * TILE_ROW, TILE_ROW);
        std::memcpy(own, from + i * TILE_ROW, TILE_ROW);
        for (int j = 0; j < LANES; ++j)
            if (mask >> j & 1) to[j] = own[j];
        std::memcpy(c + i * TILE_ROW, to, TILE_ROW);
    }
}

}  // namespace fastlora::FL_ISA
