// Kernels that try the machine itself: each of its instructions, and mistakes that it must catch.
#include "cuda/machine/machine.h"
#include "cuda/tile/numbers.h"

using namespace fastlora;

namespace {

struct Try {
    const void* in;
    void* out;
    int which;
};

// Matrices [32, 8] of 16 bits in shared memory, read by ldmatrix: 4 words a lane.
FL_KERNEL(32, 1) read_matrices(FL_PARAMETERS Try p) {
    uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
    for (int i = 0; i < 8; ++i)
        memory[lane() * 8 + i] = static_cast<const uint16_t*>(p.in)[lane() * 8 + i];
    sync_warp();
    uint32_t m[4];
    if (p.which)
        load_transposed(m, memory + lane() * 8);
    else
        load_matrices(m, memory + lane() * 8);
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(p.out)[lane() * 4 + i] = m[i];
}

// Of each lane 4 words of a, 2 of b and 4 floats of c; out: 4 floats.
FL_KERNEL(32, 1) multiply_once(FL_PARAMETERS Try p) {
    const uint32_t* in = static_cast<const uint32_t*>(p.in) + lane() * 10;
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = as_float(in[6 + i]);
    if (p.which)
        multiply<true>(d, a, in[4], in[5]);
    else
        multiply<false>(d, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) static_cast<float*>(p.out)[lane() * 4 + i] = d[i];
}

// Prefix sums of a block by shuffles and shared memory. which: without the barrier between.
FL_KERNEL(128, 1) prefix_sums(FL_PARAMETERS Try p) {
    int* of_warps = reinterpret_cast<int*>(shared_memory());
    int sum = static_cast<const int*>(p.in)[thread()];
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = shuffle_up(sum, distance);
        if (lane() >= distance) sum += below;
    }
    if (lane() == 31) of_warps[warp()] = sum;
    if (!p.which) sync_block();
    for (int w = 0; w < warp(); ++w) sum += of_warps[w];
    static_cast<int*>(p.out)[thread()] = sum;
}

// 16 bytes a thread through shared memory, the second half absent. which: nobody waits for them.
FL_KERNEL(32, 1) copy_through(FL_PARAMETERS Try p) {
    Chunk* memory = reinterpret_cast<Chunk*>(shared_memory());
    copy_async(memory + thread(), static_cast<const Chunk*>(p.in) + thread(), thread() < 16);
    copies_commit();
    if (!p.which) copies_wait<0>();
    static_cast<Chunk*>(p.out)[thread()] = memory[thread()];
}

// Two launches side by side: the first writes, the second adds 1. which: it does not wait.
FL_KERNEL(32, 1) writes(FL_PARAMETERS Try p) {
    dependents_may_begin();
    static_cast<int*>(p.out)[thread()] = thread();
}

FL_KERNEL(32, 1) adds(FL_PARAMETERS Try p) {
    if (!p.which) wait_for_previous();
    static_cast<int*>(p.out)[thread()] += 1;
}

// which 0: half of the threads end, the others wait. 1: lanes of a warp take different branches.
FL_KERNEL(64, 1) stuck(FL_PARAMETERS Try p) {
    if (p.which == 0) {
        if (thread() >= 32) sync_block();
        return;
    }
    int value = thread();
    if (lane() % 2)
        value = shuffle_xor(value, 1);
    else
        value = shuffle_up(value, 1);
    static_cast<int*>(p.out)[thread()] = value;
}

// Conversions: a float to two halves and back.
FL_KERNEL(32, 1) convert(FL_PARAMETERS Try p) {
    for (int i = thread(); i < p.which; i += 32) {
        const float f = static_cast<const float*>(p.in)[i];
        uint32_t* out = static_cast<uint32_t*>(p.out) + 4 * i;
        const uint32_t b = pair<bf16>(f, -f), h = pair<f16>(f, -f);
        out[0] = b, out[1] = h;
        out[2] = as_bits(low<bf16>(b)), out[3] = as_bits(low<f16>(h));
    }
}

}  // namespace

#define FL_TRY(kernel, threads, bytes)                                                          \
    extern "C" FASTLORA_API int32_t try_##kernel(const void* in, void* out, int32_t which,      \
                                                 void* stream) {                                \
        return launch<kernel>(#kernel, {1, 1, 1, threads, bytes, stream}, Try{in, out, which}); \
    }
FL_TRY(read_matrices, 32, 512)
FL_TRY(multiply_once, 32, 0)
FL_TRY(prefix_sums, 128, 16)
FL_TRY(copy_through, 32, 512)
FL_TRY(stuck, 64, 0)
FL_TRY(convert, 32, 0)

extern "C" FASTLORA_API int32_t try_side_by_side(const void*, void* out, int32_t which,
                                                 void* stream) {
    const Launch first{1, 1, 1, 32, 0, stream, true}, second{1, 1, 1, 32, 0, stream, false, true};
    const int code = launch<writes>("writes", first, Try{nullptr, out, which});
    return code ? code : launch<adds>("adds", second, Try{nullptr, out, which});
}
