/* The C ABI of fastlora's native libraries: every function that Python may call, and no other.
 *
 * Raw pointers, sizes, strides in elements, a dtype code and a thread count; the result is a code
 * of the list below. Nothing is retained after a call, nothing but outputs is written, and nothing
 * is written at all when the code is not FASTLORA_OK. fastlora/native.py binds these functions in
 * one table, which a test compares with this file. Change anything here: raise the version.
 *
 * Shapes: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), y (M, N), h (M, R); columns have
 * stride 1 and ld* is the distance of two rows. Sizes may be 0; a pointer to nothing may be null.
 */
#ifndef FASTLORA_H
#define FASTLORA_H

#include <stdint.h>

#define FASTLORA_ABI_VERSION 2

#if defined(__GNUC__)
#define FASTLORA_API __attribute__((visibility("default")))
#else
#define FASTLORA_API
#endif

/* What a function returns. */
#define FASTLORA_OK 0
#define FASTLORA_BAD_ARGUMENT 1  /* a size, stride, dtype or index out of range */
#define FASTLORA_NO_MEMORY 2
#define FASTLORA_NOT_FINITE 3    /* a merged value would not be, or a scaling is not */
#define FASTLORA_NOT_MERGED 4    /* the weight is not what the receipt's merge left */
#define FASTLORA_NOT_RESTORED 5  /* the receipt does not give back the original weight */

/* Element types. */
#define FASTLORA_FLOAT32 0
#define FASTLORA_BFLOAT16 1
#define FASTLORA_FLOAT16 2

#ifdef __cplusplus
extern "C" {
#endif

/* Of the CPU library, as everything up to the last two. */
FASTLORA_API int32_t fastlora_abi_version(void);

/* Names of the instruction sets that the CPU kernels can use here, best first, by commas. */
FASTLORA_API const char *fastlora_cpu_available(void);

/* The one in use. */
FASTLORA_API const char *fastlora_cpu_current(void);

/* Use the one of this name from now on. */
FASTLORA_API int32_t fastlora_cpu_use(const char *name);

/* y = x W^T + bias + scaling * (h B^T + lora_bias), h = x A^T; where weight is null y += scaling *
 * (h B^T + lora_bias). One rounding. x, weight, bias, y and h are of x_dtype, the adapter of
 * lora_dtype: x_dtype or float32. lora_A and lora_B may have any strides, given for rows and
 * columns. */
FASTLORA_API int32_t fastlora_lora_linear(
    void *y, int64_t ldy, void *h, int64_t ldh, const void *x, int64_t ldx, const void *weight,
    int64_t ldw, const void *bias, const void *lora_A, int64_t lda, int64_t lda_column,
    const void *lora_B, int64_t ldb, int64_t ldb_column, const void *lora_bias, int64_t M, int64_t K, int64_t N, int64_t R, float scaling,
    int32_t x_dtype, int32_t lora_dtype, int32_t threads);

/* Rows order[starts[s]] ... order[starts[s + 1] - 1] of x have adapter s of S: as above for each,
 * lora_A (S, R, K) and lora_B (S, N, R) with distances lda_slot and ldb_slot of two slots, scaled
 * by scalings[s] * row_scales[row]. ranks (null: all R) says how many of a slot's R ranks count;
 * others are never read into a result. order names each of the M rows once (null: 0, 1, 2, ...), starts[S]
 * is M, and the first starts[0] of them have no adapter. h is zeroed where no rank counts. */
FASTLORA_API int32_t fastlora_multi_lora_linear(
    void *y, int64_t ldy, void *h, int64_t ldh, const void *x, int64_t ldx, const void *weight,
    int64_t ldw, const void *bias, const void *lora_A, int64_t lda_slot, int64_t lda,
    const void *lora_B, int64_t ldb_slot, int64_t ldb, const int64_t *order, const int64_t *starts,
    const float *scalings, const int32_t *ranks, const float *row_scales, int64_t M, int64_t K,
    int64_t N, int64_t R, int64_t S, int32_t x_dtype, int32_t lora_dtype, int32_t threads);

/* out (R, C) = scaling * left^T right, summed in float32 in the order of the rows: left (M, R) and
 * right (M, C) of dtype, out of out_dtype (dtype or float32) with any strides. */
FASTLORA_API int32_t fastlora_gradient(
    void *out, int64_t out_row, int64_t out_column, const void *left, int64_t ld_left,
    const void *right, int64_t ld_right, int64_t M, int64_t R, int64_t C, float scaling,
    int32_t dtype, int32_t out_dtype, int32_t threads);

/* out (M, K) = scale * keep * x, or with add out += it, both of dtype. keep is the mask of rows
 * first_row, ... for the seed: see fastlora/dropout.py. threshold: lanes of 16 bits below it drop. */
FASTLORA_API int32_t fastlora_dropout(
    void *out, int64_t ldo, const void *x, int64_t ldx, int64_t M, int64_t K, int64_t first_row,
    int64_t seed, int32_t threshold, float scale, int32_t add, int32_t dtype, int32_t threads);

/* weight (N, K), any strides, becomes round(weight + d), d = lora_B lora_A in float32: one fused
 * multiply-add a rank, in the order of the ranks. lora_A (R, K) and lora_B (N, R) are contiguous
 * float32, scaling included. *receipt is what undoes it (see below); it is set when the code is
 * FASTLORA_OK, and before the call returns. Null: none is made, the merge is for good. */
FASTLORA_API int32_t fastlora_merge(
    void *weight, int64_t row, int64_t column, const float *lora_A, const float *lora_B, int64_t N,
    int64_t K, int64_t R, int32_t dtype, int32_t threads, void **receipt);

/* Of a receipt: the number of elements it holds. */
FASTLORA_API int64_t fastlora_receipt_size(const void *receipt);

/* Of a receipt, which is empty afterwards: positions (each in its tile of 65536 elements), their raw
 * bits, how many each tile has, and two checksums, of the merged weight and of everything else. */
FASTLORA_API int32_t fastlora_receipt_read(
    void *receipt, uint16_t *positions, void *bits, int32_t *counts, int64_t *checksums);

/* weight as it was before the merge that made this receipt, where the caller could not read it;
 * FASTLORA_BAD_ARGUMENT where it has. */
FASTLORA_API int32_t fastlora_receipt_undo(
    void *weight, int64_t row, int64_t column, const float *lora_A, const float *lora_B, int64_t N,
    int64_t K, int64_t R, int32_t dtype, int32_t threads, const void *receipt);

FASTLORA_API void fastlora_receipt_free(void *receipt);

/* weight as it was before fastlora_merge with the same adapters. */
FASTLORA_API int32_t fastlora_unmerge(
    void *weight, int64_t row, int64_t column, const float *lora_A, const float *lora_B, int64_t N,
    int64_t K, int64_t R, int32_t dtype, int32_t threads, const uint16_t *positions,
    const void *bits, const int32_t *counts, int64_t size, const int64_t *checksums);

/* Of the CUDA library: its version, and the architectures in it (800,900 for sm_80 and sm_90). */
FASTLORA_API int32_t fastlora_cuda_abi_version(void);
FASTLORA_API const char *fastlora_cuda_architectures(void);

#ifdef __cplusplus
}
#endif
#endif
