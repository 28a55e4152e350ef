// AMX tiles: eight registers a thread of 16 rows x 64 bytes, and the product of two of them.
//
// C[m][n] += sum over pairs p of A[m][p] . B[p][n], A and B pairs of bfloat16, C float32. Per
// product: even and odd elements are summed apart from zero by fused multiply-adds, the two sums
// added, the result added to C. Subnormal numbers are zeros, going in and coming out (Intel's
// manual, TDPBF16PS). FL_TILES_EMULATED does the same with ordinary instructions, bit for bit.
#pragma once

#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/types.h"

namespace fastlora::FL_ISA {

constexpr int64_t TILE = 1024;  // bytes of a whole tile
constexpr int ROWS_A_TILE = 16, TILE_ROW = 64;

// What ldtilecfg reads: rows and bytes a row of each register.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    constexpr TileConfig() {
        for (int t = 0; t < 8; ++t) bytes[t] = TILE_ROW, rows[t] = ROWS_A_TILE;
    }
    bool operator==(const TileConfig& other) const { return !std::memcmp(this, &other, 64); }
};

// Registers 0 ... 5 are sums, 6 is the left operand, 7 the right one.
constexpr int LEFT = 6, RIGHT = 7;
// Of a product onto sums in 0 ... 3 whose operands have other shapes.
constexpr int LEFT_RANKS = 4, RIGHT_RANKS = 5;

// The left operand and the sums have so many rows.
inline TileConfig config_of_rows(int64_t rows) {
    TileConfig config;
    for (int t = 0; t <= LEFT; ++t) config.rows[t] = uint8_t(rows);
    return config;
}

// LEFT_RANKS and RIGHT_RANKS have so many ranks, an even number.
inline TileConfig config_of_ranks(int64_t ranks) {
    TileConfig config;
    config.bytes[LEFT_RANKS] = uint16_t(2 * ranks);
    config.rows[RIGHT_RANKS] = uint8_t(ranks / 2);
    return config;
}

#ifndef FL_TILES_EMULATED

inline void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void store_config(TileConfig& config) { asm volatile("sttilecfg %0" : "=m"(config)); }
inline void release_tiles() { asm volatile("tilerelease"); }

template <int T>
inline void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(B), "i"(A), "i"(C));
}

#else

struct Tile {
    alignas(64) uint32_t words[ROWS_A_TILE][16];
};
static thread_local Tile tiles[8];
static thread_local TileConfig tile_config;

inline void load_config(const TileConfig& config) {
    tile_config = config;
    std::memset(tiles, 0, sizeof tiles);
}
inline void store_config(TileConfig& config) { config = tile_config; }
inline void release_tiles() { tile_config.palette = 0; }

// As the instruction: rows and bytes that the register does not have become zeros.
template <int T>
inline void tile_load(const void* p, int64_t stride) {
    std::memset(&tiles[T], 0, sizeof(Tile));
    for (int i = 0; i < tile_config.rows[T]; ++i)
        std::memcpy(tiles[T].words[i], static_cast<const char*>(p) + i * stride,
                    tile_config.bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
    for (int i = 0; i < tile_config.rows[T]; ++i)
        std::memcpy(static_cast<char*>(p) + i * stride, tiles[T].words[i], tile_config.bytes[T]);
}
template <int T>
inline void tile_zero() {
    std::memset(&tiles[T], 0, sizeof(Tile));
}

// MXCSR, as Tiles sets it, makes subnormal numbers zeros.
template <int C, int A, int B>
inline void tile_dot() {
    const int pairs = tile_config.rows[B];
    for (int m = 0; m < tile_config.rows[C]; ++m) {
        float even[16] = {}, odd[16] = {}, sum[16];
        for (int p = 0; p < pairs; ++p) {
            const uint32_t pair = tiles[A].words[m][p];
            const float low = bit_cast<float>(pair << 16);
            const float high = bit_cast<float>(pair & 0xffff0000);
            float b_low[16], b_high[16];
            for (int n = 0; n < 16; ++n) {
                b_low[n] = bit_cast<float>(tiles[B].words[p][n] << 16);
                b_high[n] = bit_cast<float>(tiles[B].words[p][n] & 0xffff0000);
            }
            for (int n = 0; n < 16; ++n) even[n] = std::fma(low, b_low[n], even[n]);
            for (int n = 0; n < 16; ++n) odd[n] = std::fma(high, b_high[n], odd[n]);
        }
        std::memcpy(sum, tiles[C].words[m], sizeof sum);
        for (int n = 0; n < 16; ++n) sum[n] = sum[n] + (even[n] + odd[n]);
        std::memcpy(tiles[C].words[m], sum, sizeof sum);
    }
}

#endif

// The tile registers of this thread for as long as it lives, afterwards as they were: torch's own
// AMX code in the same thread finds what it left. The same of MXCSR: rounding to nearest,
// subnormal numbers zeros, as in tiles.
class Tiles {
  public:
    Tiles() : mode(_mm_getcsr()) {
        constexpr unsigned ROUND_TO_NEAREST = 0x1f80, FLUSH = 0x8000, INPUTS_TOO = 0x40;
        _mm_setcsr(ROUND_TO_NEAREST | FLUSH | INPUTS_TOO);
        store_config(before);
        load_config(config);
    }
    ~Tiles() {
        if (before.palette)
            load_config(before);
        else
            release_tiles();
        _mm_setcsr(mode);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Takes another shape of registers, whose contents are zeros then; 130 ns unless it is there.
    void use(const TileConfig& wanted) {
        if (config == wanted) return;
        config = wanted;
        load_config(config);
    }

  private:
    unsigned mode;
    TileConfig before, config;
};

}  // namespace fastlora::FL_ISA
