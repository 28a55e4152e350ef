// What the CUDA library says of itself: its version, what it was compiled for and by, and why the
// last launch failed.
#include "cuda/machine/machine.h"

#define FL_TEXT(list) FL_TEXT_(list)
#define FL_TEXT_(...) #__VA_ARGS__

extern "C" {

int32_t fastlora_cuda_abi_version(void) { return FASTLORA_ABI_VERSION; }

const char* fastlora_cuda_last_error(void) { return fastlora::last_failure().c_str(); }

#ifdef FL_HOST

const char* fastlora_cuda_architectures(void) { return "host"; }
const char* fastlora_cuda_compiler(void) { return "g++-" __VERSION__; }

// For the host twin alone: 0 lets blocks and threads take turns in order, else the seed of an order.
FASTLORA_API void fastlora_cuda_host_order(uint64_t seed) { fastlora::host::machine.order = seed; }

#else

const char* fastlora_cuda_architectures(void) { return FL_TEXT(__CUDA_ARCH_LIST__); }
const char* fastlora_cuda_compiler(void) {
    return "nvcc-" FL_TEXT(__CUDACC_VER_MAJOR__) "." FL_TEXT(__CUDACC_VER_MINOR__) "." FL_TEXT(
        __CUDACC_VER_BUILD__);
}

#endif
}  // extern "C"
