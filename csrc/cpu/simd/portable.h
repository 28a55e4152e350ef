// Four floats at a time, for any compiler and machine.
#pragma once

#include <cmath>

#include "cpu/types.h"

namespace fastlora::FL_ISA {

constexpr int W = 4;  // floats a vector

struct F {
    float v[W];
};
using Q = F;  // four floats on their way into a transposition

inline F splat(float value) { return {{value, value, value, value}}; }
inline F zero() { return splat(0); }

template <class T>
inline F load(const T* p) {
    return {{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}

template <class T>
inline void store(T* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = narrow<T>(a.v[i]);
}

// Not fused: without the instruction that would be a call. Merging, whose bits are fixed, asks for
// fused().
inline F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
}

inline F fused(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return c;
}

inline F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
}

inline F subtract(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] -= b.v[i];
    return a;
}

inline void sums(float out[4], F a, F b, F c, F d) {
    const F parts[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        const float* v = parts[i].v;
        out[i] = (v[0] + v[2]) + (v[1] + v[3]);
    }
}

template <class T>
inline Q quad(const T* p) {
    return load(p);
}

// out[u] lane n = q[n] element u.
inline void columns(F out[4], const Q q[W]) {
    for (int u = 0; u < 4; ++u)
        for (int n = 0; n < W; ++n) out[u].v[n] = q[n].v[u];
}

// Lanes whose bits differ.
inline uint32_t differs(F a, F b) {
    uint32_t mask = 0;
    for (int i = 0; i < W; ++i)
        mask |= uint32_t(bit_cast<uint32_t>(a.v[i]) != bit_cast<uint32_t>(b.v[i])) << i;
    return mask;
}

// A value rounded to T, still a float. put() stores what is rounded.
template <class T>
inline F rounded(F a) {
    for (int i = 0; i < W; ++i) a.v[i] = widen(narrow<T>(a.v[i]));
    return a;
}
template <class T>
inline void put(T* p, F a) {
    store(p, a);
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
using Exponents = uint32_t;
inline Exponents largest(Exponents seen, F a) {
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(a.v[i]) & 0x7fffffff;
        seen = bits > seen ? bits : seen;
    }
    return seen;
}
inline uint32_t largest(Exponents seen) { return seen; }
inline bool finite(Exponents seen) { return seen < 0x7f800000; }

// Sum over words i of (low half + low half of key) * (high half + high half of key), key = (first +
// i) * step, words a multiple of 8; total() of what was begun as Sum{}.
using Sum = uint64_t;
inline Sum keyed_sum(Sum sum, const void* data, int words, uint64_t first, uint64_t step) {
    for (int i = 0; i < words; ++i) {
        uint64_t word;
        std::memcpy(&word, static_cast<const char*>(data) + 8 * i, 8);
        const uint64_t key = (first + i) * step;
        sum += uint64_t(uint32_t(word) + uint32_t(key)) *
               uint64_t(uint32_t(word >> 32) + uint32_t(key >> 32));
    }
    return sum;
}
inline uint64_t total(Sum sum) { return sum; }

}  // namespace fastlora::FL_ISA
