// Eight floats at a time: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/types.h"

namespace fastlora::FL_ISA {

constexpr int W = 8;  // floats a vector

using F = __m256;
using Q = __m128;  // four floats on their way into a transposition

inline F zero() { return _mm256_setzero_ps(); }
inline F splat(float value) { return _mm256_set1_ps(value); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fused(F a, F b, F c) { return fma(a, b, c); }

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline void store(bf16* p, F a) {
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    const __m256i even = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

inline void sums(float out[4], F a, F b, F c, F d) {
    const F pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
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
    for (int i = 0; i < 4; ++i) z[i] = _mm256_set_m128(q[i + 4], q[i]);
    const F a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpackhi_ps(z[0], z[1]);
    const F c = _mm256_unpacklo_ps(z[2], z[3]), d = _mm256_unpackhi_ps(z[2], z[3]);
    out[0] = _mm256_shuffle_ps(a, c, 0x44);
    out[1] = _mm256_shuffle_ps(a, c, 0xee);
    out[2] = _mm256_shuffle_ps(b, d, 0x44);
    out[3] = _mm256_shuffle_ps(b, d, 0xee);
}

// Lanes whose bits differ.
inline uint32_t differs(F a, F b) {
    const __m256i same = _mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(same)) & 0xff;
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
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
    return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(int(0xffff0000))));
}
template <>
inline F rounded<f16>(F a) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void put(float* p, F a) { store(p, a); }
inline void put(f16* p, F a) { store(p, a); }
inline void put(bf16* p, F a) {
    const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// The positions base + lane and raw elements of the lanes in mask, one behind the other; returns
// how many. Room for W of them.
template <class T>
inline int note(uint16_t* positions, T* bits, uint32_t mask, int base, const T* raw) {
    int count = 0;
    for (; mask; mask &= mask - 1, ++count) {
        const int lane = __builtin_ctz(mask);
        positions[count] = uint16_t(base + lane);
        bits[count] = raw[lane];
    }
    return count;
}

// The largest magnitudes seen, as bits.
using Exponents = __m256i;
inline Exponents largest(Exponents seen, F a) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(seen, bits);
}
inline uint32_t largest(Exponents seen) {
    uint32_t lanes[8], most = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), seen);
    for (uint32_t lane : lanes) most = lane > most ? lane : most;
    return most;
}
inline bool finite(Exponents seen) {
    const __m256i odd = _mm256_cmpgt_epi32(seen, _mm256_set1_epi32(0x7f7fffff));
    return _mm256_testz_si256(odd, odd);
}

// Sum over words i of (low half + low half of key) * (high half + high half of key), key = (first +
// i) * step, words a multiple of 8; total() of what was begun as Sum{}.
using Sum = __m256i;
inline Sum keyed_sum(Sum sum, const void* data, int words, uint64_t first, uint64_t step) {
    const __m256i lanes = _mm256_set_epi64x(3 * step, 2 * step, step, 0);
    __m256i key = _mm256_add_epi64(_mm256_set1_epi64x(first * step), lanes);
    const __m256i next = _mm256_set1_epi64x(4 * step);
    for (int i = 0; i < words; i += 4) {
        const char* at = static_cast<const char*>(data) + 8 * i;
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i both = _mm256_add_epi32(word, key);
        sum = _mm256_add_epi64(sum, _mm256_mul_epu32(both, _mm256_srli_epi64(both, 32)));
        key = _mm256_add_epi64(key, next);
    }
    return sum;
}
inline uint64_t total(Sum sum) {
    uint64_t parts[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), sum);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

}  // namespace fastlora::FL_ISA
