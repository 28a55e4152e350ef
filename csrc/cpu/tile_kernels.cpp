// The CPU kernels by tiles, FL_ISA: those of bfloat16, where AMX or its emulation is. Everything else
// of such a machine is kernels.cpp's, of the instruction set that entry.cpp names.
#include "cpu/linear/call.h"
#include "cpu/tiles/tile_rows.h"

namespace fastlora::FL_ISA {
namespace {

template <class X, class T>
using Kernel = TileRows<T>;

}  // namespace

extern const TileTable tile_table = {[](const LinearArgs& a) {
    return a.lora_dtype == FASTLORA_FLOAT32 ? linear_by<Kernel, bf16, float>(a)
                                            : linear_by<Kernel, bf16, bf16>(a);
}};

}  // namespace fastlora::FL_ISA
