// Products of tiles along K: one or two tiles of rows of W (or A) by one to six of x, in registers.
//
// Rows of W are the left operand as they lie, x the right one, packed beforehand: C [outputs, rows
// of x]. Each C is one register from its first step to its last, or stored as float32 in between:
// a row's bits do not depend on what is computed beside it.
#pragma once

#include <utility>

#include "cpu/tiles/tile.h"

namespace fastlora::FL_ISA {

// Rows of the left operand: as they lie (rows `stride` bytes apart, 64 bytes a step), or packed as
// tiles. `second` is from the first 16 rows to the next 16.
struct Left {
    const char* p;
    int64_t stride, second, step;

    static Left rows(const void* p, int64_t stride) {
        return {static_cast<const char*>(p), stride, 16 * stride, TILE_ROW};
    }
    // [steps][2 tiles]
    static Left packed(const void* p) {
        return {static_cast<const char*>(p), TILE_ROW, TILE, 2 * TILE};
    }
    Left from(int64_t steps) const { return {p + steps * step, stride, second, step}; }
    Left half(int which) const { return {p + which * second, stride, second, step}; }
};

template <int... I>
inline void zero_all(std::integer_sequence<int, I...>) {
    (tile_zero<I>(), ...);
}
// Sums 0 ... NT * MT - 1: tile n of the left operand by tile m of x is n * MT + m.
template <int NT, int MT>
inline void zero_sums() {
    zero_all(std::make_integer_sequence<int, NT * MT>());
}

template <int... I>
inline void store_all(char* c, std::integer_sequence<int, I...>) {
    (tile_store<I>(c + I * TILE, TILE_ROW), ...);
}
template <int... I>
inline void load_all(const char* c, std::integer_sequence<int, I...>) {
    (tile_load<I>(c + I * TILE, TILE_ROW), ...);
}
// c: [NT][MT] tiles.
template <int NT, int MT>
inline void store_sums(char* c) {
    store_all(c, std::make_integer_sequence<int, NT * MT>());
}
template <int NT, int MT>
inline void load_sums(const char* c) {
    load_all(c, std::make_integer_sequence<int, NT * MT>());
}

// The tiles of x one after the other, the last one stays in its register.
template <int MT, int... M>
inline void forwards(const char* x, std::integer_sequence<int, M...>) {
    ((tile_load<RIGHT>(x + M * TILE, TILE_ROW), tile_dot<M, LEFT, RIGHT>()), ...);
}
// Backwards, from the one that is there.
template <int MT, int... M>
inline void backwards(const char* x, std::integer_sequence<int, M...>) {
    tile_dot<2 * MT - 1, LEFT, RIGHT>();
    ((tile_load<RIGHT>(x + (MT - 2 - M) * TILE, TILE_ROW), tile_dot<2 * MT - 2 - M, LEFT, RIGHT>()),
     ...);
}

// `count` steps of 32 k. x: [count] tiles of MT rows, x_step bytes from one step to the next.
// after(k, n): the n'th left tile of step k is in its register; memory is idle meanwhile.
template <int NT, int MT, class After>
inline __attribute__((always_inline)) void steps(Left w, const char* x, int64_t x_step,
                                                 int64_t count, After after) {
    for (int64_t k = 0; k < count; ++k, x += x_step) {
        tile_load<LEFT>(w.p, w.stride);
        after(k, 0);
        forwards<MT>(x, std::make_integer_sequence<int, MT>());
        if constexpr (NT == 2) {
            tile_load<LEFT>(w.p + w.second, w.stride);
            after(k, 1);
            backwards<MT>(x, std::make_integer_sequence<int, MT - 1>());
        }
        w.p += w.step;
    }
}

template <int NT, int MT>
inline void steps(Left w, const char* x, int64_t x_step, int64_t count) {
    steps<NT, MT>(w, x, x_step, count, [](int64_t, int) {});
}

// One step for tile M of MT alone: its adapter's ranks. h: one tile.
template <int NT, int MT, int M>
inline void rank_step(Left B, const char* h) {
    tile_load<RIGHT>(h, TILE_ROW);
    tile_load<LEFT>(B.p, B.stride);
    tile_dot<M, LEFT, RIGHT>();
    if constexpr (NT == 2) {
        tile_load<LEFT>(B.p + B.second, B.stride);
        tile_dot<MT + M, LEFT, RIGHT>();
    }
}

// The same with B's rows as they lie, of as many ranks as registers were configured for.
template <int MT, int M>
inline void rank_step_in_place(const char* B, int64_t stride, const char* h) {
    tile_load<RIGHT_RANKS>(h, TILE_ROW);
    tile_load<LEFT_RANKS>(B, stride);
    tile_dot<M, LEFT_RANKS, RIGHT_RANKS>();
    tile_load<LEFT_RANKS>(B + 16 * stride, stride);
    tile_dot<MT + M, LEFT_RANKS, RIGHT_RANKS>();
}

}  // namespace fastlora::FL_ISA
