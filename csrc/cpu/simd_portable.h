// Four floats at a time, for any compiler and machine.
#pragma once

#include <cmath>

#include "types.h"

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

// Which of 64 elements differ in their bits.
template <class T>
inline uint64_t different(const T* a, const T* b) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) mask |= uint64_t(std::memcmp(a + i, b + i, sizeof(T)) != 0) << i;
    return mask;
}

}  // namespace fastlora::FL_ISA
