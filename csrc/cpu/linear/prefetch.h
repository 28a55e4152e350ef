// Fetches what comes next a few lines at a time, while the work at hand leaves memory idle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/buffer.h"

namespace fastlora {

// Rows of several matrices that lie alike. Threads have one each, in cache lines of their own.
template <class T>
class alignas(64) Prefetch {
  public:
    // More would push out of a core's cache what it is to bring in.
    static constexpr int64_t LINES = 4096;

    explicit Prefetch(int64_t matrices) : matrices(matrices) {}

    void clear(int64_t row_length, int64_t rows) {
        count = next = row = 0;
        length = row_length;
        this->rows = rows;
        // Of rows that share a line, one.
        step = std::max<int64_t>(1, 64 / std::max<int64_t>(1, length * int64_t(sizeof(T))));
    }

    void add(const T* matrix) { matrices[count++] = matrix; }

    int64_t lines() const { return std::min(LINES, count * ((rows + step - 1) / step)); }

    void fetch(int64_t some) {
        for (; some > 0 && next < count; --some) {
            __builtin_prefetch(matrices[next] + row * length, 0, 2);
            row += step;
            if (row >= rows) row = 0, ++next;
        }
    }

  private:
    Buffer<const T*> matrices;
    int64_t count = 0, next = 0, row = 0, length = 0, rows = 0, step = 1;
};

}  // namespace fastlora
