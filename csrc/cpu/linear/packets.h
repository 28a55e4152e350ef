// How numbers of one type enter products: the same few words for every type and instruction set.
//
// Packets<X>, X the type of x: a Packet is STEP neighbours of a row, for dot products along K. A
// column is one vector of W neighbouring outputs for PER ranks, for h B^T; H is how h enters it.
#pragma once

#include "cpu/simd/simd.h"

namespace fastlora::FL_ISA {

// Everything is widened to float32.
template <class X>
struct Packets {
    static constexpr int STEP = 2 * W, PER = 1;
    using H = float;

    struct Packet {
        F low, high;
    };

    template <class T>
    static Packet packet(const T* p) {
        return {load(p), load(p + W)};
    }

    static F dot(F sum, Packet a, Packet b) { return fma(a.high, b.high, fma(a.low, b.low, sum)); }

    static F step(F sum, F column, const H* h) { return fma(column, splat(*h), sum); }

    template <class T>
    static Q quad(const T* p) {
        return FL_ISA::quad(p);
    }

    // The column of outputs n ... n + W - 1 of PER ranks, whose outputs lie side by side.
    template <class T>
    static F column(const T* const* rank, int64_t n) {
        return load(rank[0] + n);
    }

    // Two vectors of columns of PER rows; lane(c) is where column c of them went.
    static void rows(F out[2], const X* const row[PER]) {
        out[0] = load(row[0]);
        out[1] = load(row[0] + W);
    }
    static constexpr int lane(int c) { return c; }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 are multiplied and summed in float32 by one instruction; h and float32 adapters
// are rounded to enter it.
template <>
struct Packets<bf16> {
    static constexpr int STEP = 32, PER = 2;
    using H = bf16;
    using Packet = __m512bh;

    static Packet packet(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Packet packet(const float* p) {
        return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
    }

    static F dot(F sum, Packet a, Packet b) { return _mm512_dpbf16_ps(sum, a, b); }

    static F step(F sum, F column, const H* h) {
        int32_t pair;
        std::memcpy(&pair, h, sizeof pair);
        return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)_mm512_set1_epi32(pair));
    }

    static Q quad(const bf16* p) { return _mm_loadu_ps(reinterpret_cast<const float*>(p)); }
    static Q quad(const float* p) { return (__m128)_mm256_cvtneps_pbh(_mm256_loadu_ps(p)); }

    static F column(const bf16* const* rank, int64_t n) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rank[0] + n));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rank[1] + n));
        return paired(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    static F column(const float* const* rank, int64_t n) {
        return paired((__m512i)_mm512_cvtne2ps_pbh(load(rank[1] + n), load(rank[0] + n)));
    }
    // The halves' neighbours: element i of the lower one beside element i of the upper one.
    static F paired(__m512i halves) {
        const __m512i lower =
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(W));
        const __m512i from = _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(from, halves));
    }

    static void rows(F out[2], const bf16* const row[PER]) {
        const __m512i a = _mm512_loadu_si512(row[0]), b = _mm512_loadu_si512(row[1]);
        out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    }
    // Eight columns in 128 bits: four of them to either vector.
    static constexpr int lane(int c) { return c % 8 / 4 * W + c / 8 * 4 + c % 4; }
};
#endif

}  // namespace fastlora::FL_ISA
