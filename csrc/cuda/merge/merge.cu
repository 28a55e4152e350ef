// Merging, unmerging and swapping adapters in place: the C functions of merge.h.
#include "cuda/merge/merge.h"

using namespace fastlora;

namespace {

// Calls with a value of the type that a dtype names.
template <class F>
int32_t typed(int32_t dtype, F call) {
    switch (dtype) {
        case FASTLORA_FLOAT32: return call(float{});
        case FASTLORA_BFLOAT16: return call(bf16{});
        case FASTLORA_FLOAT16: return call(f16{});
        default: return FASTLORA_BAD_ARGUMENT;
    }
}

bool known(int32_t dtype) { return dtype >= FASTLORA_FLOAT32 && dtype <= FASTLORA_FLOAT16; }

}  // namespace

extern "C" int32_t fastlora_cuda_swap(
    const int64_t* weights, const int64_t* adapters, const float* scales, const int32_t* weight_of,
    int32_t* states, const int64_t* old_sums, const int32_t* old_counts, const int64_t* old_offsets,
    int64_t* sums, int32_t* counts, int64_t* offsets, int64_t* cursor, void* pool,
    int64_t tiles_in_all, int64_t capacity, int32_t wanted, int32_t dtype, int32_t old_dtype,
    int32_t new_dtype, int32_t how, void* stream) {
    if (tiles_in_all < 0 || !known(old_dtype) || !known(new_dtype)) return FASTLORA_BAD_ARGUMENT;
    Swap p{};
    p.weights = weights, p.adapters = adapters, p.scales = scales, p.weight_of = weight_of;
    p.states = states, p.old_sums = old_sums, p.old_counts = old_counts;
    p.old_offsets = old_offsets, p.sums = sums, p.counts = counts, p.offsets = offsets;
    p.cursor = cursor, p.pool = pool, p.tiles = tiles_in_all, p.capacity = capacity;
    p.wanted = wanted, p.old_dtype = old_dtype, p.new_dtype = new_dtype;
    p.undo = how & FASTLORA_UNDO, p.merge = how & FASTLORA_MERGE, p.keep = how & FASTLORA_KEEP;
    p.check = how & FASTLORA_SUMS, p.pooled = how & FASTLORA_POOLED;
    return typed(dtype, [&](auto type) {
        using T = decltype(type);
        const Launch launched{tiles_in_all, 1, 1, MERGE_THREADS, Merge<T, true>::SHARED, stream};
        return how & FASTLORA_ALIGNED ? launch<swap_tiles<T, true>>("swap_tiles", launched, p)
                                      : launch<swap_tiles<T, false>>("swap_tiles", launched, p);
    });
}

extern "C" int32_t fastlora_cuda_gather(uint16_t* positions, void* bits, const void* pool,
                                        const int64_t* starts, const int64_t* offsets,
                                        const int32_t* counts, int64_t tiles_in_all, int32_t dtype,
                                        void* stream) {
    if (tiles_in_all < 0) return FASTLORA_BAD_ARGUMENT;
    const Gather p{positions, bits, pool, starts, offsets, counts};
    return typed(dtype, [&](auto type) {
        const Launch launched{tiles_in_all, 1, 1, MERGE_THREADS, 0, stream};
        return launch<gather<decltype(type)>>("gather", launched, p);
    });
}
