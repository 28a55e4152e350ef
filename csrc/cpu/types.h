// Element types as they lie in memory, and their conversions one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlora {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float widen(float value) { return value; }

inline float widen(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

// Exponent rebiased by a multiplication, which normalises denormals too.
inline float widen(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

// To nearest, ties to even; NaN stays NaN and keeps its upper payload.
template <class T>
inline T narrow(float value);

template <>
inline float narrow<float>(float value) {
    return value;
}

template <>
inline bf16 narrow<bf16>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}

template <>
inline f16 narrow<f16>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value), rest = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff))};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    if (rest < 0x38800000) {
        // Denormal: adding 1/2 leaves its bits, rounded by the addition, at the end of the sum's.
        const float shifted = bit_cast<float>(rest) + 0.5f;
        return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
    }
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}

}  // namespace fastlora
