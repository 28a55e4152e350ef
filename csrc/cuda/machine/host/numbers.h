// Half-precision numbers as a GPU converts them: to the nearest, ties to even, one NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastlora::host {

inline float from_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t to_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

inline float from_bfloat16(uint16_t raw) { return from_bits(uint32_t(raw) << 16); }

inline uint16_t to_bfloat16(float f) {
    const uint32_t bits = to_bits(f);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t raw) {
    const uint32_t sign = uint32_t(raw & 0x8000) << 16, rest = raw & 0x7FFF;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    return from_bits(sign | to_bits(float(rest) * 0x1p-24f));
}

inline uint16_t to_float16(float f) {
    const uint32_t bits = to_bits(f);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return 0x7FFF;
    if (size >= 0x477FF000) return sign | 0x7C00;
    // Below the smallest normal number the unit in the last place is 2^-24 throughout.
    if (size < 0x38800000) return sign | uint16_t(std::nearbyintf(from_bits(size) * 0x1p24f));
    return sign | uint16_t((size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13);
}

}  // namespace fastlora::host
