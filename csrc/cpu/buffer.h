// Memory for the duration of a call, not zeroed.
#pragma once

#include <cstdint>
#include <memory>

namespace fastlora {

template <class T>
struct Buffer : std::unique_ptr<T[]> {
    explicit Buffer(int64_t count = 0) : std::unique_ptr<T[]>(new T[count]) {}
};

}  // namespace fastlora
