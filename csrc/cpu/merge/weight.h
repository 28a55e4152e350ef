// The weight of a merge, of any strides, and its blocks.
#pragma once

#include "cpu/merge/delta.h"
#include "cpu/merge/receipt.h"

namespace fastlora::FL_ISA {

template <class T>
struct Weight {
    T* data;
    int64_t row, column, N, K;

    T* at(int64_t n, int64_t k) const { return data + n * row + k * column; }

    // A row of a block: where it lies, or a copy with zeros past its end.
    const T* read(T* copy, int64_t n, int64_t k, int64_t count) const {
        const T* from = at(n, k);
        if (column == 1 && count == BLOCK_K) return from;
        std::memset(copy, 0, BLOCK_K * sizeof(T));
        for (int64_t i = 0; i < count; ++i) copy[i] = from[i * column];
        return copy;
    }

    void write(const T* from, int64_t n, int64_t k, int64_t count) const {
        T* to = at(n, k);
        if (column == 1 && count == BLOCK_K)
            std::memcpy(to, from, BLOCK_K * sizeof(T));
        else
            for (int64_t i = 0; i < count; ++i) to[i * column] = from[i];
    }
};

// visit(n, k, rows, count, position of its first element) for the tile's blocks, until false.
template <class Visit>
bool visit_blocks(const Tiles& tiles, int64_t tile, Visit visit) {
    const int64_t top = tiles.top(tile), left = tiles.left(tile);
    const int64_t height = tiles.rows(tile), width = tiles.columns(tile);
    for (int64_t n = 0; n < height; n += BLOCK_N)
        for (int64_t k = 0; k < width; k += BLOCK_K)
            if (!visit(top + n, left + k, std::min(BLOCK_N, height - n),
                       std::min(BLOCK_K, width - k), n * width + k))
                return false;
    return true;
}

}  // namespace fastlora::FL_ISA
