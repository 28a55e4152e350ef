// Checksums: words of 8 bytes, a key that follows from the place added to each half, the halves'
// product summed modulo 2^64 (NH, of Black et al., "UMAC: fast and secure message authentication",
// 1999, with keys that are not secret).
#pragma once

#include "cpu/simd/simd.h"

namespace fastlora::FL_ISA {

// Odd: 2^64 over the golden ratio.
constexpr uint64_t KEY = 0x9e3779b97f4a7c15u;

inline uint64_t digest(const void* data, int64_t bytes, uint64_t first) {
    const char* from = static_cast<const char*>(data);
    const int64_t whole = bytes / 64 * 64;
    Sum sum{};
    for (int64_t at = 0; at < whole; at += 64)
        sum = keyed_sum(sum, from + at, 8, first + at / 8 + 1, KEY);
    char rest[64] = {};
    if (whole < bytes) std::memcpy(rest, from + whole, bytes - whole);
    return total(keyed_sum(sum, rest, 8, first + whole / 8 + 1, KEY));
}

}  // namespace fastlora::FL_ISA
