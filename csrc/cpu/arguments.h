// What every C function checks of its arguments.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>

#include "fastlora.h"

namespace fastlora {

inline bool sizes(std::initializer_list<int64_t> values) {
    for (int64_t value : values)
        if (value < 0 || value > int64_t(1) << 40) return false;
    return true;
}

// A number of threads; more than any machine has cores is a mistake.
inline bool count(int32_t threads) { return threads >= 1 && threads <= 4096; }

// A matrix of `rows` rows whose distance is `stride`, `columns` wide.
inline bool matrix(const void* p, int64_t rows, int64_t columns, int64_t stride) {
    if (rows == 0 || columns == 0) return true;
    return p && (rows == 1 || stride >= columns || stride <= -columns);
}

// The same, where rows may overlap: it is only read.
inline bool readable(const void* p, int64_t rows, int64_t columns) {
    return rows == 0 || columns == 0 || p;
}

inline int64_t element_size(int32_t dtype) { return dtype == FASTLORA_FLOAT32 ? 4 : 2; }

template <class Call>
int32_t guarded(Call call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return FASTLORA_NO_MEMORY;
    } catch (...) {
        return FASTLORA_BAD_ARGUMENT;
    }
}

}  // namespace fastlora
