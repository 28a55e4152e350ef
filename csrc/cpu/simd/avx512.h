// Sixteen floats at a time: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "cpu/types.h"

namespace fastlora::FL_ISA {

constexpr int W = 16;  // floats a vector

using F = __m512;
using Q = __m128;  // four floats on their way into a transposition

inline F zero() { return _mm512_setzero_ps(); }
inline F splat(float value) { return _mm512_set1_ps(value); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fused(F a, F b, F c) { return fma(a, b, c); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline F load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
// Denormals too, unlike the instruction.
inline void store_exact(bf16* p, F a) {
    const __m512i bits = _mm512_castps_si512(a), upper = _mm512_srli_epi32(bits, 16);
    const __m512i even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i words =
        _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, upper, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}
#ifdef __AVX512BF16__
inline void store(bf16* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
}
#else
inline void store(bf16* p, F a) { store_exact(p, a); }
#endif
inline void store(f16* p, F a) {
    const __m256i raw = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw);
}

// Four by four within every 128 bits: out[u] lane 4 b + i = z[i] lane 4 b + u.
inline void transpose(F out[4], const F z[4]) {
    const F a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
    const F c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
    out[0] = _mm512_shuffle_ps(a, c, 0x44);
    out[1] = _mm512_shuffle_ps(a, c, 0xee);
    out[2] = _mm512_shuffle_ps(b, d, 0x44);
    out[3] = _mm512_shuffle_ps(b, d, 0xee);
}

inline void sums(float out[4], F a, F b, F c, F d) {
    const F z[4] = {a, b, c, d};
    F t[4];
    transpose(t, z);
    const F all = _mm512_add_ps(_mm512_add_ps(t[0], t[2]), _mm512_add_ps(t[1], t[3]));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline Q quad(const float* p) { return _mm_loadu_ps(p); }
inline Q quad(const bf16* p) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}
inline Q quad(const f16* p) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// out[u] lane n = q[n] element u.
inline void columns(F out[4], const Q q[W]) {
    F z[4];
    for (int i = 0; i < 4; ++i) {
        z[i] = _mm512_insertf32x4(_mm512_castps128_ps512(q[i]), q[i + 4], 1);
        z[i] = _mm512_insertf32x4(_mm512_insertf32x4(z[i], q[i + 8], 2), q[i + 12], 3);
    }
    transpose(out, z);
}

// Lanes whose bits differ.
inline uint32_t differs(F a, F b) {
    return _mm512_cmpneq_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(b));
}

// A value rounded to T, still a float; of bfloat16 no NaN. put() stores what is rounded.
template <class T>
inline F rounded(F a);
template <>
inline F rounded<float>(F a) {
    return a;
}
template <>
inline F rounded<bf16>(F a) {
    const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(int(0xffff0000))));
}
template <>
inline F rounded<f16>(F a) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void put(float* p, F a) { store(p, a); }
inline void put(f16* p, F a) { store(p, a); }
inline void put(bf16* p, F a) {
    const __m512i words = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}

// The positions base + lane and raw elements of the lanes in mask, one behind the other; returns
// how many. Room for W of them.
template <class T>
inline int note(uint16_t* positions, T* bits, uint32_t mask, int base, const T* raw) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i where = _mm512_maskz_compress_epi32(mask, lanes);
    const __m256i at = _mm512_cvtepi32_epi16(_mm512_add_epi32(where, _mm512_set1_epi32(base)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions), at);
    if constexpr (sizeof(T) == 4) {
        const __m512i kept = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(raw));
        _mm512_storeu_si512(bits, kept);
    } else {
        const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw));
        const __m512i kept = _mm512_maskz_compress_epi32(mask, _mm512_cvtepu16_epi32(narrow));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), _mm512_cvtepi32_epi16(kept));
    }
    return __builtin_popcount(mask);
}

// The largest magnitudes seen, as bits.
using Exponents = __m512i;
inline Exponents largest(Exponents seen, F a) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(seen, bits);
}
inline uint32_t largest(Exponents seen) { return _mm512_reduce_max_epi32(seen); }
inline bool finite(Exponents seen) {
    return !_mm512_cmpge_epi32_mask(seen, _mm512_set1_epi32(0x7f800000));
}

// Sum over words i of (low half + low half of key) * (high half + high half of key), key = (first +
// i) * step, words a multiple of 8; total() of what was begun as Sum{}.
using Sum = __m512i;
inline Sum keyed_sum(Sum sum, const void* data, int words, uint64_t first, uint64_t step) {
    const __m512i lanes =
        _mm512_set_epi64(7 * step, 6 * step, 5 * step, 4 * step, 3 * step, 2 * step, step, 0);
    __m512i key = _mm512_add_epi64(_mm512_set1_epi64(first * step), lanes);
    const __m512i next = _mm512_set1_epi64(8 * step);
    for (int i = 0; i < words; i += 8) {
        const __m512i word = _mm512_loadu_si512(static_cast<const char*>(data) + 8 * i);
        const __m512i both = _mm512_add_epi32(word, key);
        sum = _mm512_add_epi64(sum, _mm512_mul_epu32(both, _mm512_srli_epi64(both, 32)));
        key = _mm512_add_epi64(key, next);
    }
    return sum;
}
inline uint64_t total(Sum sum) {
    uint64_t lanes[8], all = 0;
    _mm512_storeu_si512(lanes, sum);
    for (uint64_t lane : lanes) all += lane;
    return all;
}

}  // namespace fastlora::FL_ISA
