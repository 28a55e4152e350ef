// How numbers of one type enter products: the same few words for every type and instruction set.
//
// Kind<X>, X the type of x: a Packet is STEP neighbours of a row, for dot products along K. A column
// is one vector of W neighbouring outputs for PER ranks, for h B^T; H is how h enters it.
#pragma once

#include "simd.h"

namespace fastlora::FL_ISA {

// Everything is widened to float32.
template <class X>
struct Kind {
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
struct Kind<bf16> {
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
