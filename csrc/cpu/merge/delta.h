// What a merge adds, d = sum over ranks of B[n, r] A[r, k], in bits that nothing changes.
//
// A chain of fused multiply-adds in float32 in the order of the ranks: IEEE 754 fixes every bit,
// whatever the instruction set, compiler or number of threads. A block's sums stay in registers; A,
// as a strip of its columns, in a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

#include "cpu/buffer.h"
#include "cpu/simd/simd.h"

namespace fastlora::FL_ISA {

// A block of the weight: rows and columns.
constexpr int64_t BLOCK_N = 16, BLOCK_K = 64;
// A row of a block's scratch: no power of two, or stores wait for loads 4096 bytes apart.
constexpr int64_t LINE = BLOCK_K + 16;

// Rounding to nearest, denormals kept, whatever the thread had: other modes have other bits.
class Rounding {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();

  public:
    Rounding() { _mm_setcsr(0x1f80); }
    ~Rounding() { _mm_setcsr(before); }
#else
    std::fenv_t before;

  public:
    Rounding() {
        std::fegetenv(&before);
        std::fesetenv(FE_DFL_ENV);
    }
    ~Rounding() { std::fesetenv(&before); }
#endif
};

// d of a block.
class Delta {
  public:
    // A (R, K), B (N, R).
    Delta(const float* A, const float* B, int64_t N, int64_t K, int64_t R)
        : strips((K + BLOCK_K - 1) / BLOCK_K), A(strips * BLOCK_K * R), B(B), N(N), R(R) {
        // Strips of BLOCK_K columns, zeros past the last: rows that a power of two lies between
        // would fall into one set of the cache.
        for (int64_t k = 0; k < K; k += BLOCK_K)
            for (int64_t r = 0; r < R; ++r) {
                float* to = &this->A[k * R + r * BLOCK_K];
                const int64_t count = std::min(BLOCK_K, K - k);
                std::fill(std::copy(A + r * K + k, A + r * K + k + count, to), to + BLOCK_K, 0.0f);
            }
    }

    void operator()(float d[BLOCK_N][LINE], int64_t n, int64_t k) const {
        for (int64_t i = 0; i < BLOCK_N && n + i < N; i += ROWS)
            tile(n + i, k, [&](int64_t j, int64_t at, const F(&sum)[VECTORS]) {
                for (int v = 0; v < VECTORS; ++v) store(d[i + j] + at + v * W, sum[v]);
            });
    }

    // Rows, and vectors of each, whose sums registers hold.
    static constexpr int64_t ROWS = 4;
    static constexpr int VECTORS = W == 16 ? 4 : W == 8 ? 2 : 1;

    // emit(row, column, sums) of ROWS rows from n on, BLOCK_K columns from k on, VECTORS a time.
    template <class Emit>
    void tile(int64_t n, int64_t k, Emit emit) const {
        const float* row[ROWS];
        for (int64_t i = 0; i < ROWS; ++i) row[i] = B + std::min(n + i, N - 1) * R;
        for (int64_t at = 0; at < BLOCK_K; at += VECTORS * W) {
            F sum[ROWS][VECTORS];
            for (auto& each : sum)
                for (F& s : each) s = zero();
            for (int64_t r = 0; r < R; ++r) {
                F a[VECTORS];
                for (int v = 0; v < VECTORS; ++v) a[v] = load(&A[k * R + r * BLOCK_K] + at + v * W);
                for (int i = 0; i < ROWS; ++i)
                    for (int v = 0; v < VECTORS; ++v)
                        sum[i][v] = fused(splat(row[i][r]), a[v], sum[i][v]);
            }
            // Unrolled, or the sums would go through memory.
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) emit(i, at, sum[i]);
        }
    }

    // No |d| is larger; infinite where a factor is not finite.
    double bound() const {
        // Magnitudes of floats compare as their bits do, NaN last; so compilers can use vectors.
        const auto size = [](float value) { return bit_cast<int32_t>(value) & 0x7fffffff; };
        std::vector<int32_t> left(R), right(R);
        for (int64_t i = 0; i < strips * R; ++i)
            for (int64_t j = 0; j < BLOCK_K; ++j)
                right[i % R] = std::max(right[i % R], size(A[i * BLOCK_K + j]));
        for (int64_t n = 0; n < N; ++n)
            for (int64_t r = 0; r < R; ++r) left[r] = std::max(left[r], size(B[n * R + r]));
        double sum = 0;
        for (int64_t r = 0; r < R; ++r) {
            if (std::max(left[r], right[r]) >= size(HUGE_VALF)) return HUGE_VAL;
            sum += double(bit_cast<float>(left[r])) * bit_cast<float>(right[r]);
        }
        return sum;
    }

  private:
    int64_t strips;
    Buffer<float> A;  // [K / BLOCK_K, R, BLOCK_K]
    const float* B;
    int64_t N, R;
};

}  // namespace fastlora::FL_ISA
