// The vectors of the instruction set that this file is compiled for, FL_ISA: its namespace.
#pragma once

#if defined(FL_AVX512)
#include "cpu/simd/avx512.h"
#elif defined(FL_AVX2)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/portable.h"
#endif

namespace fastlora::FL_ISA {

// Rounded to nearest, with denormals, whatever the instruction set.
template <class T>
inline void store_exact(T* p, F a) {
    store(p, a);
}

// Finite values, rounded and stored side by side.
template <class T, int COUNT>
inline void put_finite(T* p, const F (&a)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) put(p + i * W, rounded<T>(a[i]));
}
#if defined(FL_AVX512) && defined(__AVX512BF16__)
// The instruction takes denormals for zeros: where there are any, it is not used.
inline void put_finite(bf16* p, const F (&a)[4]) {
    constexpr int DENORMAL = 0x20;
    const auto tiny =
        _mm512_fpclass_ps_mask(a[0], DENORMAL) | _mm512_fpclass_ps_mask(a[1], DENORMAL) |
        _mm512_fpclass_ps_mask(a[2], DENORMAL) | _mm512_fpclass_ps_mask(a[3], DENORMAL);
    if (__builtin_expect(tiny, 0)) return put_finite<bf16, 4>(p, a);
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(a[1], a[0]));
    _mm512_storeu_si512(p + 2 * W, (__m512i)_mm512_cvtne2ps_pbh(a[3], a[2]));
}
#endif

// The first `count` of a vector, zeros behind them.
template <class T>
inline F load_some(const T* p, int64_t count) {
    if (count == W) return load(p);
    T padded[W] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* p, int64_t count, F a) {
    if (count == W) return store(p, a);
    T padded[W];
    store(padded, a);
    std::memcpy(p, padded, count * sizeof(T));
}

}  // namespace fastlora::FL_ISA
