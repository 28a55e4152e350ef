// Eight floats at a time: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace fastlora::FL_ISA {

constexpr int W = 8;  // floats a vector

using F = __m256;
using Q = __m128;  // four floats on their way into a transposition

inline F zero() { return _mm256_setzero_ps(); }
inline F splat(float value) { return _mm256_set1_ps(value); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
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

// Which of 64 elements differ in their bits.
template <class T>
inline uint64_t different(const T* a, const T* b) {
    constexpr int step = 32 / sizeof(T);
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += step) {
        const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
        uint32_t same;
        if constexpr (sizeof(T) == 4) {
            same = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(left, right)));
        } else {
            const __m256i equal = _mm256_cmpeq_epi16(left, right);
            const __m256i bytes = _mm256_packs_epi16(equal, _mm256_setzero_si256());
            same = _mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)) & 0xffff;
        }
        constexpr uint32_t all = (1u << step) - 1;
        mask |= uint64_t(~same & all) << i;
    }
    return mask;
}

}  // namespace fastlora::FL_ISA
