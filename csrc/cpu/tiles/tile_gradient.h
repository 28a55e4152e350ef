// out (R, C) = scaling * left^T right by tiles, for dA = g^T x and dB = (h^T dY)^T.
//
// Rows are what is summed along: pairs of neighbouring rows of `right` are a right operand as they
// are read, those of `left` are turned once. A column is summed by one thread in the rows' order.
#pragma once

#include <vector>

#include "cpu/threads.h"
#include "cpu/tiles/operands.h"
#include "cpu/tiles/outputs.h"

namespace fastlora::FL_ISA {

template <class T>
class TileGradient {
  public:
    explicit TileGradient(const GradientArgs& a)
        : a(a), left(static_cast<const bf16*>(a.left)), right(static_cast<const bf16*>(a.right)),
          out(static_cast<T*>(a.out)), all_steps(divide_up(a.M, STEP)),
          rank_tiles(divide_up(a.R, ROWS_A_TILE)),
          turned(rank_tiles * all_steps * TILE / int64_t(sizeof(Words)) + 1) {}

    void run() {
        char* to = base();
        for (int64_t t = 0; t < rank_tiles; ++t)
            for (int64_t k = 0; k < all_steps; ++k, to += TILE) turn(to, t * ROWS_A_TILE, k * STEP);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
        {
            Tiles tiles;
#pragma omp for schedule(dynamic)
            for (int64_t c = 0; c < a.C; c += PANEL_N)
                for (int64_t t = 0; t < rank_tiles; t += 3) {
                    const int64_t some = std::min<int64_t>(3, rank_tiles - t);
                    if (some == 3) sum<3>(t, c);
                    if (some == 2) sum<2>(t, c);
                    if (some == 1) sum<1>(t, c);
                }
        }
    }

  private:
    const GradientArgs& a;
    const bf16 *left, *right;
    T* out;
    int64_t all_steps, rank_tiles;
    std::vector<Words> turned;  // [rank_tiles, steps] tiles

    char* base() { return reinterpret_cast<char*>(turned.data()); }

    // Pairs of rows m ... m + 31 of a matrix, from column c on: halves[2][16 pairs].
    static void pairs(Words (*half)[16], const bf16* p, int64_t ld, int64_t rows, int64_t columns) {
        for (int64_t i = 0; i < 16; ++i) {
            const bf16* row = p + 2 * i * ld;
            const Words even = 2 * i < rows ? load_halves(row, columns) : Words{};
            const Words odd = 2 * i + 1 < rows ? load_halves(row + ld, columns) : Words{};
            Words both[2];
            zip(both, even, odd);
            half[0][i] = both[0];
            half[1][i] = both[1];
        }
    }

    // A left operand: 16 ranks of 32 rows.
    void turn(char* to, int64_t r, int64_t m) const {
        Words half[2][16];
        pairs(half, left + m * a.ld_left + r, a.ld_left, std::min(STEP, a.M - m),
              std::min<int64_t>(ROWS_A_TILE, a.R - r));
        transpose(half[0]);
        for (int i = 0; i < 16; ++i) put_line(to + i * TILE_ROW, half[0][i]);
    }

    // 16 * RT ranks of tile t on, of 32 columns.
    template <int RT>
    void sum(int64_t t, int64_t c) {
        alignas(64) char x[2 * TILE], sums[2 * RT * TILE];
        const int64_t columns = std::min(PANEL_N, a.C - c);
        zero_sums<2, RT>();
        for (int64_t k = 0; k < all_steps; ++k) {
            Words half[2][16];
            pairs(half, right + k * STEP * a.ld_right + c, a.ld_right,
                  std::min(STEP, a.M - k * STEP), columns);
            for (int h = 0; h < 2; ++h)
                for (int i = 0; i < 16; ++i) put_line(x + h * TILE + i * TILE_ROW, half[h][i]);
            const char* from = base() + (t * all_steps + k) * TILE;
            add<RT>(from, x, std::make_integer_sequence<int, RT>());
        }
        store_sums<2, RT>(sums);
        for (int i = 0; i < RT; ++i)
            for (int h = 0; h < 2; ++h)
                if (h * LANES < columns)
                    put(sums + (2 * i + h) * TILE, (t + i) * ROWS_A_TILE, c + h * LANES);
    }

    template <int RT, int... I>
    void add(const char* from, const char* x, std::integer_sequence<int, I...>) const {
        (add_tile<I>(from + I * all_steps * TILE, x), ...);
    }
    template <int I>
    static void add_tile(const char* from, const char* x) {
        tile_load<LEFT>(from, TILE_ROW);
        tile_load<RIGHT>(x, TILE_ROW);
        tile_dot<2 * I, LEFT, RIGHT>();
        tile_load<RIGHT>(x + TILE, TILE_ROW);
        tile_dot<2 * I + 1, LEFT, RIGHT>();
    }

    // A tile [ranks, columns] from rank r and column c on.
    void put(const char* sum, int64_t r, int64_t c) const {
        const int64_t ranks = std::min<int64_t>(ROWS_A_TILE, a.R - r);
        const int64_t columns = std::min<int64_t>(LANES, a.C - c);
        Words line[16];
        for (int i = 0; i < 16; ++i) line[i] = (Words)(floats_at(sum, i) * spread(a.scaling));
        T* to = out + r * a.out_row + c * a.out_column;
        if (a.out_column == 1) return put_rows(to, a.out_row, line, ranks, columns);
        transpose(line);
        if (a.out_row == 1) return put_rows(to, a.out_column, line, columns, ranks);
        for (int64_t i = 0; i < columns; ++i)
            for (int64_t j = 0; j < ranks; ++j)
                to[i * a.out_column + j * a.out_row] =
                    narrow<T>(bit_cast<float>(uint32_t(line[i][j])));
    }

    static void put_rows(T* to, int64_t ld, const Words* line, int64_t rows, int64_t columns) {
        for (int64_t i = 0; i < rows; ++i)
            if constexpr (sizeof(T) == 4)
                std::memcpy(to + i * ld, &line[i], columns * sizeof(T));
            else
                store_halves(to + i * ld, columns, narrow_both((Floats)line[i], Floats{}));
    }
};

}  // namespace fastlora::FL_ISA
