// Half-precision numbers, alone, in pairs and in chunks of 16 bytes.
#pragma once

#include "cuda/machine/machine.h"

#ifdef FL_HOST
#include <cmath>
#endif

namespace fastlora {

struct bf16 {
    uint16_t raw;
};
struct f16 {
    uint16_t raw;
};

template <class T>
constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<bf16> = true;

struct alignas(16) Chunk {
    uint32_t word[4];
};

// One multiplication and addition with one rounding, whatever the compiler's flags.
FL_DEVICE float fused(float a, float b, float c) {
#ifdef FL_HOST
    return std::fma(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

FL_DEVICE float as_float(uint32_t bits) {
#ifdef FL_HOST
    return host::from_bits(bits);
#else
    return __uint_as_float(bits);
#endif
}

FL_DEVICE uint32_t as_bits(float f) {
#ifdef FL_HOST
    return host::to_bits(f);
#else
    return __float_as_uint(f);
#endif
}

// The number of 16 raw bits, in the low half of a word.
template <class T>
FL_DEVICE float wide(uint32_t raw) {
    if constexpr (is_bf16<T>) {
        return as_float(raw << 16);
    } else {
#ifdef FL_HOST
        return host::from_float16(uint16_t(raw));
#else
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(raw)));
        return f;
#endif
    }
}

FL_DEVICE float number(float f) { return f; }
FL_DEVICE float number(bf16 h) { return wide<bf16>(h.raw); }
FL_DEVICE float number(f16 h) { return wide<f16>(h.raw); }

template <class T>
FL_DEVICE float low(uint32_t pair) {
    return wide<T>(pair & 0xFFFF);
}
template <class T>
FL_DEVICE float high(uint32_t pair) {
    if constexpr (is_bf16<T>) return as_float(pair & 0xFFFF0000);
    return wide<T>(pair >> 16);
}

// Two numbers, each rounded once; the first is the low half.
template <class T>
FL_DEVICE uint32_t pair(float first, float second) {
#ifdef FL_HOST
    const auto raw = [](float f) {
        return is_bf16<T> ? host::to_bfloat16(f) : host::to_float16(f);
    };
    return raw(first) | uint32_t(raw(second)) << 16;
#else
    uint32_t both;
    if constexpr (is_bf16<T>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#endif
}

template <class T>
FL_DEVICE T rounded(float f) {
    return T{uint16_t(pair<T>(f, 0.0f) & 0xFFFF)};
}

}  // namespace fastlora
