// What kernels ask of a GPU beyond C++: launches, barriers, and the instructions of a whole warp.
//
// The one header with PTX. Its twin, host/machine.h, has the same names and runs the kernels on a
// machine without a GPU; nothing else knows which of the two it is compiled with. Instructions and
// the layout of their operands are those of NVIDIA's PTX ISA manual, by their names in it.
#pragma once

#ifdef FL_HOST
#include "cuda/machine/host/machine.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "cuda/launch.h"

#define FL_DEVICE __device__ __forceinline__
#define FL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FL_PARAMETERS __grid_constant__ const

namespace fastlora {

FL_DEVICE int thread() { return threadIdx.x; }
FL_DEVICE int lane() { return threadIdx.x % 32; }
FL_DEVICE int warp() { return threadIdx.x / 32; }
FL_DEVICE int block(int dimension = 0) {
    return dimension == 0 ? blockIdx.x : dimension == 1 ? blockIdx.y : blockIdx.z;
}

// The block's dynamic shared memory, from a multiple of 128 bytes on.
FL_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

FL_DEVICE uint32_t in_shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ld.global.v4, st.global.v4: of memory whose address comes from a table, so that the compiler
// does not know that it is global.
FL_DEVICE void load_global(uint32_t (&words)[4], const void* p) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(p)
                 : "memory");
}
FL_DEVICE void store_global(void* p, const uint32_t (&words)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
}

// bar.sync
FL_DEVICE void sync_block() { __syncthreads(); }

// bar.warp.sync
FL_DEVICE void sync_warp() { __syncwarp(); }

// cp.async.cg.shared.global, 16 bytes: of global memory, or zeros. What is not there is not read.
FL_DEVICE void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(in_shared(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// cp.async.commit_group
FL_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: all of this thread's groups but the last PENDING are there.
template <int PENDING>
FL_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4: four 8 x 8 matrices, whose rows lanes 8 j ... 8 j + 7 point to.
FL_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(in_shared(row))
                 : "memory");
}

// The same, each matrix transposed.
FL_DEVICE void load_transposed(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(in_shared(row))
                 : "memory");
}

// mma.sync.aligned.m16n8k16.row.col.f32: d += a b, of bfloat16 or float16.
template <bool BFLOAT16>
FL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BFLOAT16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// shfl.sync.bfly
template <class V>
FL_DEVICE V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// shfl.sync.up: of the lane that many below; the first ones keep their own.
template <class V>
FL_DEVICE V shuffle_up(V value, int distance) {
    return __shfl_up_sync(0xFFFFFFFFu, value, distance);
}

// griddepcontrol.launch_dependents: a launch that depends on this one may begin.
FL_DEVICE void dependents_may_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// griddepcontrol.wait: what the launch before this one has written is there from here on.
FL_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FL_DEVICE int64_t atomic_add(int64_t* to, int64_t value) {
    return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(to), (unsigned long long)value));
}

// Launches KERNEL, which takes its parameters as one struct. `name` is what an error calls it.
template <auto KERNEL, class P>
int launch(const char* name, const Launch& how, const P& parameters) {
    if (how.x == 0 || how.y == 0 || how.z == 0) return FASTLORA_OK;
    // Beyond 48 KiB a kernel asks, once a device for each larger size.
    static std::mutex alone;
    static std::map<int, int> asked;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && how.shared > 48 * 1024) {
        const std::lock_guard<std::mutex> lock(alone);
        int& most = asked[device];
        if (how.shared > most)
            error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         how.shared);
        if (error == cudaSuccess && how.shared > most) most = how.shared;
    }
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(how.x, how.y, how.z);
        config.blockDim = dim3(how.threads);
        config.dynamicSmemBytes = how.shared;
        config.stream = static_cast<cudaStream_t>(how.stream);
        config.attrs = &attribute;
        config.numAttrs = how.beside ? 1 : 0;
        error = cudaLaunchKernelEx(&config, KERNEL, parameters);
    }
    return error == cudaSuccess ? FASTLORA_OK : failed(name, cudaGetErrorString(error));
}

}  // namespace fastlora
#endif
