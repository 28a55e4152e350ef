// One adapter on tensor cores: which kernels run a product, and their C functions.
//
// Few rows: one_pass. Many: shrink, then gemm, launched so that they run side by side where the GPU
// can. Forward and the gradient for x differ in how the second factors lie alone.
#include "cuda/linear/gemm.h"
#include "cuda/linear/one_pass.h"
#include "cuda/linear/shrink.h"

namespace fastlora {
namespace {

// Rows a tile of one_pass has; up to RANKS ranks are summed beside.
constexpr int RANKS = 64;

template <class T, Layout BY, int BM>
int run_one_pass(const Linear<T>& p, void* stream) {
    using S = OnePass<T, BY, BM, RANKS, 3>;
    const Launch how{tiles(p.N, S::BN), tiles(p.M, BM), 1, S::THREADS, S::SHARED, stream};
    return launch<one_pass<S, T>>("one_pass", how, p);
}

template <class T, class E, Layout BY>
int run_shrink(const Linear<T>& p, void* stream, bool first) {
    using S = Shrink<T, E, BY>;
    const Launch how{tiles(p.M, S::BM), tiles(p.R, S::BR), 1, S::THREADS, S::SHARED, stream, first};
    return launch<shrink<S, T>>("shrink", how, p);
}

template <class T, Layout BY, int BM, int BN, int WM, int WN, int STAGES>
int run_gemm(const Linear<T>& p, void* stream, bool beside) {
    using G = Gemm<T, BY, BM, BN, WM, WN, STAGES>;
    const int64_t blocks = tiles(p.M, BM) * tiles(p.N, BN);
    const Launch how{blocks, 1, 1, G::THREADS, G::SHARED, stream, false, beside};
    return launch<gemm<G, T>>("gemm", how, p);
}

template <class T, Layout BY>
int run(Linear<T> p, int32_t path, Dropout drop, bool drops_x, bool overlap, void* stream) {
    const Dropout none{nullptr, 0, 1.0f};
    if (path == FASTLORA_ONE_PASS) {
        p.drop = none;
        return p.M <= 16 ? run_one_pass<T, BY, 16>(p, stream) : run_one_pass<T, BY, 32>(p, stream);
    }
    overlap = overlap && p.R > 0 && p.M > 0 && p.N > 0;
    if (p.R > 0) {
        p.drop = drops_x ? drop : none;
        const int code = p.a.single ? run_shrink<T, float, BY>(p, stream, overlap)
                                    : run_shrink<T, T, BY>(p, stream, overlap);
        if (code != FASTLORA_OK) return code;
    }
    p.drop = drops_x ? none : drop;
    const bool beside = overlap;
    switch (path) {
        case FASTLORA_TILE_64: return run_gemm<T, BY, 64, 64, 32, 32, 4>(p, stream, beside);
        case FASTLORA_TILE_128: return run_gemm<T, BY, 128, 128, 64, 64, 3>(p, stream, beside);
        default: return run_gemm<T, BY, 256, 128, 64, 64, 3>(p, stream, beside);
    }
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

extern "C" int32_t fastlora_cuda_lora_linear(
    void* y, int64_t ldy, void* h, void* scaled, const void* x, int64_t ldx, const void* weight,
    int64_t ldw, const void* bias, const void* lora_A, int64_t lda, const void* lora_B, int64_t ldb,
    const void* lora_bias, int64_t M, int64_t K, int64_t N, int64_t R, float scaling,
    const int64_t* seed, int32_t threshold, float keep_scale, int32_t drops_x, int32_t transposed,
    int32_t path, int32_t overlap, int32_t x_dtype, int32_t lora_dtype, void* stream) {
    const bool half = x_dtype == FASTLORA_BFLOAT16 || x_dtype == FASTLORA_FLOAT16;
    const bool sizes =
        M >= 0 && K >= 0 && N >= 0 && R >= 0 && R % 8 == 0 && K % 8 == 0 && N % 8 == 0;
    const bool adapter = lora_dtype == x_dtype || lora_dtype == FASTLORA_FLOAT32;
    const bool small = lora_dtype == x_dtype && R <= RANKS && !seed;
    if (!half || !sizes || !adapter || path < FASTLORA_ONE_PASS || path > FASTLORA_TILE_256 ||
        (path == FASTLORA_ONE_PASS && !small))
        return FASTLORA_BAD_ARGUMENT;
    const auto call = [&](auto type) {
        using T = decltype(type);
        Linear<T> p{};
        const T* w = static_cast<const T*>(weight);
        p.x = {static_cast<const T*>(x), ldx, M, K};
        p.w = transposed ? Matrix<T>{w, ldw, K, N} : Matrix<T>{w, ldw, N, K};
        p.a = {lora_A, lda, lora_dtype == FASTLORA_FLOAT32};
        p.b = {lora_B, ldb, lora_dtype == FASTLORA_FLOAT32};
        p.y = static_cast<T*>(y), p.ldy = ldy;
        p.h = static_cast<T*>(h), p.scaled = static_cast<T*>(scaled);
        p.bias = static_cast<const T*>(bias), p.lora_bias = lora_bias;
        p.M = M, p.K = K, p.N = N, p.R = int(R), p.factor = scaling;
        const Dropout drop{seed, uint32_t(threshold), keep_scale};
        return transposed ? run<T, BY_K>(p, path, drop, drops_x, overlap, stream)
                          : run<T, BY_N>(p, path, drop, drops_x, overlap, stream);
    };
    return x_dtype == FASTLORA_BFLOAT16 ? call(bf16{}) : call(f16{});
}
