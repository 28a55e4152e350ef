// Up to 64 rows with an adapter each: the C function of decode.h.
#include "cuda/multi/decode.h"

namespace fastlora {
namespace {

template <class T, class E, int BM, int STAGES, bool WEIGHT>
int run_tile(const Decode<T>& p, bool beside, void* stream) {
    using S = DecodeTile<T, E, BM, STAGES, WEIGHT>;
    const Launch how{tiles(p.N, S::BN),       tiles(p.M, BM), 1,     S::THREADS,
                     S::shared(p.adapters.R), stream,         false, beside};
    return launch<decode<S, T>>(WEIGHT ? "decode" : "decode_add", how, p);
}

template <class T, class E>
int run(const Decode<T>& p, bool overlap, void* stream) {
    const int64_t groups = int64_t(p.adapters.R) * p.adapters.slices / SHRINK_RANKS;
    const int shared = SHRINK_THREADS / 32 * SHRINK_RANKS * 4;
    const bool first = overlap && groups > 0 && p.M > 0 && p.N > 0;
    const Launch how{p.M, groups, 1, SHRINK_THREADS, shared, stream, first};
    const int code = launch<row_shrink<T, E>>("row_shrink", how, p);
    if (code != FASTLORA_OK) return code;
    if (!p.w.p) return run_tile<T, E, 16, 2, false>(p, first, stream);
    if (p.M <= 16) return run_tile<T, E, 16, 5, true>(p, first, stream);
    if (p.M <= 32) return run_tile<T, E, 32, 4, true>(p, first, stream);
    return run_tile<T, E, 64, 3, true>(p, first, stream);
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

extern "C" int32_t fastlora_cuda_multi_lora_decode(
    void* y, int64_t ldy, void* h, const void* x, int64_t ldx, const void* weight, int64_t ldw,
    const void* bias, const void* lora_A, int64_t a_slot, int64_t a_slice, int64_t a_rank,
    const void* lora_B, int64_t b_slot, int64_t b_rank, int64_t b_column, const int32_t* ids,
    const float* scalings, const int32_t* ranks, const float* row_scales, const int32_t* table,
    int64_t table_ld, int64_t pages, int64_t page, const int64_t* ends, int64_t slices, int64_t M,
    int64_t K, int64_t N, int64_t R, int64_t S, int32_t overlap, int32_t x_dtype,
    int32_t lora_dtype, void* stream) {
    const bool half = x_dtype == FASTLORA_BFLOAT16 || x_dtype == FASTLORA_FLOAT16;
    const bool adapter = lora_dtype == x_dtype || lora_dtype == FASTLORA_FLOAT32;
    const bool sizes = M >= 0 && M <= 64 && K >= 0 && N >= 0 && S >= 0 && R >= 0 && R % 8 == 0 &&
                       K % 8 == 0 && N % 8 == 0 && R <= 512 && slices >= 1 && slices <= SLICES;
    const bool unit = b_rank == 1 || b_column == 1;
    if (!half || !adapter || !sizes || !unit || (table && (page < 8 || page % 8)))
        return FASTLORA_BAD_ARGUMENT;
    const auto call = [&](auto type) {
        using T = decltype(type);
        Decode<T> p{};
        p.x = {static_cast<const T*>(x), ldx, M, K};
        p.w = {static_cast<const T*>(weight), ldw, N, K};
        p.y = static_cast<T*>(y), p.ldy = ldy;
        p.h = static_cast<T*>(h);
        p.bias = static_cast<const T*>(bias);
        p.M = M, p.N = N;
        p.adapters = {lora_A,   lora_B, a_slot, a_slice,   a_rank,      b_slot,     b_rank,
                      b_column, ids,    ranks,  table,     scalings,    row_scales, table_ld,
                      pages,    int(S), int(R), int(page), int(slices), {}};
        for (int i = 0; i < slices; ++i) p.adapters.ends[i] = ends[i];
        return lora_dtype == FASTLORA_FLOAT32 ? run<T, float>(p, overlap, stream)
                                              : run<T, T>(p, overlap, stream);
    };
    return x_dtype == FASTLORA_BFLOAT16 ? call(bf16{}) : call(f16{});
}
