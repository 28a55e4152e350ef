// Lines of 64 bytes around tiles: 32 bfloat16, or 16 pairs of them, or 16 floats.
//
// With AVX-512 and its BF16 conversions in a few instructions, elsewhere (where tiles are emulated)
// in plain C++ with the same bits.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "cpu/simd/simd.h"

namespace fastlora::FL_ISA {

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));

constexpr int64_t LANES = 16, HALVES = 32;

template <class Line>
inline Line line_at(const void* p) {
    Line line;
    std::memcpy(&line, p, sizeof line);
    return line;
}
template <class Line>
inline void put_line(void* p, Line line) {
    std::memcpy(p, &line, sizeof line);
}
inline Floats spread(float value) { return Floats{} + value; }

#if defined(__AVX512BF16__)

inline __mmask32 first(int64_t count) { return count >= HALVES ? ~0u : (1u << count) - 1; }

// The first `count` of 32 bfloat16, zeros behind them; float32 is rounded.
inline Words load_halves(const bf16* p, int64_t count) {
    return (Words)_mm512_maskz_loadu_epi16(first(count), p);
}
inline Words load_halves(const float* p, int64_t count) {
    const __mmask32 mask = first(count);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), p);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + LANES);
    return (Words)_mm512_cvtne2ps_pbh(high, low);
}
inline void store_halves(bf16* p, int64_t count, Words line) {
    _mm512_mask_storeu_epi16(p, first(count), (__m512i)line);
}

// Word i is the pair of bfloat16 (low[i], high[i]), rounded.
inline Words pair(Floats low, Floats high) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_or_si512(
        lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(LANES)), 16));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Words)_mm512_permutexvar_epi16(from, both);
}

// 32 bfloat16: those of `low`, then those of `high`.
inline Words narrow_both(Floats low, Floats high) {
    return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

inline Words keep_lanes(Words line, uint32_t mask) {
    return (Words)_mm512_maskz_mov_epi32(__mmask16(mask), (__m512i)line);
}
inline Words keep_halves(Words line, int64_t count) {
    return (Words)_mm512_maskz_mov_epi16(first(count), (__m512i)line);
}

// Sixteen by sixteen words: out[i] word j = in[j] word i.
inline void transpose(Words line[16]) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = (__m512i)line[i];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        line[i] = (Words)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        line[i + 8] = (Words)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Pairs (a[n], b[n]) of 32 bfloat16 each: those of n < 16, those of the others.
inline void zip(Words out[2], Words a, Words b) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(
        lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(HALVES)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    out[0] = (Words)_mm512_permutex2var_epi16((__m512i)a, low, (__m512i)b);
    out[1] = (Words)_mm512_permutex2var_epi16((__m512i)a, high, (__m512i)b);
}

inline bool all_finite(Floats line) {
    constexpr int INFINITE_OR_NAN = 0x99;
    return !_mm512_fpclass_ps_mask((__m512)line, INFINITE_OR_NAN);
}

// Elements 0 ... 15 (half 0) or 16 ... 31 of 32 bfloat16.
inline Floats widen_half(Words line, int half) {
    const __m256i halves =
        half ? _mm512_extracti64x4_epi64((__m512i)line, 1) : _mm512_castsi512_si256((__m512i)line);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

#else

// As the instruction: to nearest even, subnormal numbers to zero.
inline bf16 narrow_flushed(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return bits & 0x7f800000 ? narrow<bf16>(value) : bf16{uint16_t(bits >> 16 & 0x8000)};
}

inline Words load_halves(const bf16* p, int64_t count) {
    Words line = {};
    std::memcpy(&line, p, std::min(count, HALVES) * sizeof *p);
    return line;
}
inline Words load_halves(const float* p, int64_t count) {
    bf16 halves[HALVES] = {};
    for (int64_t i = 0; i < std::min(count, HALVES); ++i) halves[i] = narrow_flushed(p[i]);
    return line_at<Words>(halves);
}
inline void store_halves(bf16* p, int64_t count, Words line) {
    std::memcpy(p, &line, std::min(count, HALVES) * sizeof *p);
}

inline Words pair(Floats low, Floats high) {
    bf16 halves[HALVES];
    for (int i = 0; i < LANES; ++i) {
        halves[2 * i] = narrow_flushed(low[i]);
        halves[2 * i + 1] = narrow_flushed(high[i]);
    }
    return line_at<Words>(halves);
}

inline Words narrow_both(Floats low, Floats high) {
    bf16 halves[HALVES];
    for (int i = 0; i < LANES; ++i) {
        halves[i] = narrow_flushed(low[i]);
        halves[LANES + i] = narrow_flushed(high[i]);
    }
    return line_at<Words>(halves);
}

inline Words keep_lanes(Words line, uint32_t mask) {
    for (int i = 0; i < LANES; ++i)
        if (!(mask >> i & 1)) line[i] = 0;
    return line;
}

inline Words keep_halves(Words line, int64_t count) {
    Words kept = {};
    std::memcpy(&kept, &line, std::min(count, HALVES) * sizeof(bf16));
    return kept;
}

inline void transpose(Words line[16]) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) {
            const uint32_t kept = line[i][j];
            line[i][j] = line[j][i];
            line[j][i] = kept;
        }
}

inline void zip(Words out[2], Words a, Words b) {
    bf16 from[2][HALVES], to[2 * HALVES];
    put_line(from[0], a);
    put_line(from[1], b);
    for (int n = 0; n < HALVES; ++n) to[2 * n] = from[0][n], to[2 * n + 1] = from[1][n];
    out[0] = line_at<Words>(to);
    out[1] = line_at<Words>(to + HALVES);
}

inline bool all_finite(Floats line) {
    for (int i = 0; i < LANES; ++i)
        if ((bit_cast<uint32_t>(line[i]) & 0x7f800000) == 0x7f800000) return false;
    return true;
}

inline Floats widen_half(Words line, int half) {
    bf16 halves[HALVES];
    put_line(halves, line);
    Floats out;
    for (int i = 0; i < LANES; ++i) out[i] = widen(halves[half * LANES + i]);
    return out;
}

#endif

}  // namespace fastlora::FL_ISA
