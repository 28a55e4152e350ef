// What the merge kernels take: the table of weights, the state of each tile, elements as words.
#pragma once

#include "cuda/tile/numbers.h"

namespace fastlora {

enum State { FRESH, DONE, NOT_FINITE, NOT_MERGED, NOT_RESTORED, NO_ROOM };

// Columns of the table of weights: pointer, strides of rows and columns, N, K, first tile, tiles
// across, first and number of the adapters to take out, of those to put in, the old receipt's
// positions and bits, or the pool that has both.
constexpr int WEIGHT = 13;

struct Swap {
    const int64_t *weights, *adapters;
    const float* scales;
    const int32_t* weight_of;
    int32_t* states;
    const int64_t* old_sums;
    const int32_t* old_counts;
    const int64_t* old_offsets;
    int64_t* sums;
    int32_t* counts;
    int64_t *offsets, *cursor;
    void* pool;
    int64_t tiles, capacity;
    int wanted, old_dtype, new_dtype;
    bool undo, merge, keep, check, pooled;
};

// Weights of T, half-precision ones two in a word. `Raw` is what one element is.
template <class T>
struct Words {
    using Raw = uint16_t;
    using Packed = uint32_t;
    static constexpr int EACH = 2;
    FL_DEVICE static float get(uint32_t word, int i) { return i ? high<T>(word) : low<T>(word); }
    FL_DEVICE static uint32_t put(const float* f) { return pair<T>(f[0], f[1]); }
};
template <>
struct Words<float> {
    using Raw = uint32_t;
    using Packed = uint64_t;
    static constexpr int EACH = 1;
    FL_DEVICE static float get(uint32_t word, int) { return as_float(word); }
    FL_DEVICE static uint32_t put(const float* f) { return as_bits(f[0]); }
};

}  // namespace fastlora
