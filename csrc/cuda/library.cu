// What the CUDA library says of itself: its version, and what it was compiled for.
#include "../fastlora.h"

#define FL_TEXT(list) FL_TEXT_(list)
#define FL_TEXT_(...) #__VA_ARGS__

extern "C" {

int32_t fastlora_cuda_abi_version(void) { return FASTLORA_ABI_VERSION; }

const char *fastlora_cuda_architectures(void) { return FL_TEXT(__CUDA_ARCH_LIST__); }

}  // extern "C"
