// out (R, C) = scaling * left^T right, for dA = g^T x and dB = (h^T dY)^T.
//
// Rows are summed in their order, in float32, by the one thread that owns a range of columns: no
// partial sums. Blocks of rows, so that a strip of `right` comes from a cache for every rank.
#pragma once

#include <vector>

#include "cpu/linear/packets.h"
#include "cpu/threads.h"

namespace fastlora::FL_ISA {

// Ranks a tile; rows a block; columns a task.
constexpr int RB = W == 16 ? 8 : 4;
constexpr int64_t ROWS = 64, STRIP = 256;
// Columns a tile: two vectors.
constexpr int CB = 2 * W;

template <class X>
struct Gradient {
    using packets = Packets<X>;
    static constexpr int PER = packets::PER;  // rows a step

    const typename packets::H* left;  // [M / PER, R, PER], zeros past M
    const X* right;
    int64_t ld_right, M, R;
    float* sums;  // [R, STRIP], columns of a tile where packets::lane puts them

    // Rows first ... last - 1 onto ranks r ... r + RANKS - 1 of the columns that begin at `columns`
    // and have their sums at `at`.
    template <int RANKS>
    void tile(int64_t first, int64_t last, int64_t r, const X* columns, int64_t ld,
              int64_t at) const {
        F sum[RANKS][2];
        for (int i = 0; i < RANKS; ++i)
            for (int v = 0; v < 2; ++v) sum[i][v] = load(sums + (r + i) * STRIP + at + v * W);
        const X nothing[CB] = {};
        for (int64_t m = first; m < last; m += PER) {
            const X* row[PER];
            for (int i = 0; i < PER; ++i)
                row[i] = m + i < last ? columns + (m + i - first) * ld : nothing;
            F x[2];
            packets::rows(x, row);
            const auto* factor = left + (m * R + r * PER);
            for (int i = 0; i < RANKS; ++i)
                for (int v = 0; v < 2; ++v)
                    sum[i][v] = packets::step(sum[i][v], x[v], factor + i * PER);
        }
        for (int i = 0; i < RANKS; ++i)
            for (int v = 0; v < 2; ++v) store(sums + (r + i) * STRIP + at + v * W, sum[i][v]);
    }

    // Columns begin ... end - 1, at most STRIP.
    void strip(int64_t begin, int64_t end) const {
        std::fill(sums, sums + R * STRIP, 0.0f);
        for (int64_t first = 0; first < M; first += ROWS) {
            const int64_t last = std::min(first + ROWS, M);
            for (int64_t c = begin; c < end; c += CB) {
                const X* columns = right + first * ld_right + c;
                int64_t ld = ld_right;
                X padded[ROWS * CB];
                if (c + CB > end) {
                    for (int64_t m = 0; m < last - first; ++m) {
                        std::fill(padded + m * CB, padded + (m + 1) * CB, X{});
                        std::copy(columns + m * ld, columns + m * ld + end - c, padded + m * CB);
                    }
                    columns = padded;
                    ld = CB;
                }
                int64_t r = 0;
                for (; r + RB <= R; r += RB) tile<RB>(first, last, r, columns, ld, c - begin);
                for (; r < R; ++r) tile<1>(first, last, r, columns, ld, c - begin);
            }
        }
    }
};

template <class X, class T>
void gradient(T* out, int64_t out_row, int64_t out_column, const X* left, int64_t ld_left,
              const X* right, int64_t ld_right, int64_t M, int64_t R, int64_t C, float scaling,
              int threads) {
    using packets = Packets<X>;
    constexpr int PER = packets::PER;
    std::vector<typename packets::H> factors((M + PER - 1) / PER * PER * R);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t r = 0; r < R; ++r)
            factors[(m / PER * R + r) * PER + m % PER] =
                narrow<typename packets::H>(widen(left[m * ld_left + r]));
    std::vector<float> sums(threads * R * STRIP);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < C; begin += STRIP) {
        const int64_t end = std::min(begin + STRIP, C);
        float* own = sums.data() + omp_get_thread_num() * R * STRIP;
        Gradient<X>{factors.data(), right, ld_right, M, R, own}.strip(begin, end);
        for (int64_t c = begin; c < end; ++c) {
            const int64_t at = c - begin, place = at / CB * CB + packets::lane(int(at % CB));
            for (int64_t r = 0; r < R; ++r)
                out[r * out_row + c * out_column] = narrow<T>(scaling * own[r * STRIP + place]);
        }
    }
}

}  // namespace fastlora::FL_ISA
