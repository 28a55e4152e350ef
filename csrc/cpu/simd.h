// The vectors of the instruction set that this file is compiled for, FL_ISA: its namespace.
#pragma once

#if defined(FL_AVX512)
#include "simd_avx512.h"
#elif defined(FL_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace fastlora::FL_ISA {

// Rounded to nearest, with denormals, whatever the instruction set.
template <class T>
inline void store_exact(T* p, F a) {
    store(p, a);
}

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
