// The CPU kernels by tiles, FL_ISA: those of bfloat16, where AMX or its emulation is. Everything else
// of such a machine is kernels.cpp's, of the instruction set that choices.h names.
#include "cpu/linear/call.h"
#include "cpu/tiles/tile_gradient.h"
#include "cpu/tiles/tile_rows.h"

namespace fastlora::FL_ISA {
namespace {

template <class X, class T>
using Kernel = TileRows<T>;

int32_t linear(const LinearArgs& a) {
    const bool wide = a.lora_dtype == FASTLORA_FLOAT32;
    return wide ? linear_by<Kernel, bf16, float>(a) : linear_by<Kernel, bf16, bf16>(a);
}

int32_t gradient(const GradientArgs& a) {
    if (a.out_dtype == FASTLORA_FLOAT32)
        TileGradient<float>(a).run();
    else
        TileGradient<bf16>(a).run();
    return FASTLORA_OK;
}

}  // namespace

extern const TileTable tile_table = {linear, gradient};

}  // namespace fastlora::FL_ISA
