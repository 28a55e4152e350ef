/* The C ABI of fastlora's native libraries: every function that Python may call, and no other.
 *
 * Raw pointers, sizes, strides in elements, a dtype code and a thread count; the result is a code
 * of the list below. Nothing is retained after a call, nothing but outputs is written, and nothing
 * is written at all when the code is not FASTLORA_OK. fastlora/backends/native.py binds these
 * functions in one table, which a test compares with this file. Change anything here: raise the
 * version.
 *
 * Shapes: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), y (M, N), h (M, R); columns have
 * stride 1 and ld* is the distance of two rows. Sizes may be 0; a pointer to nothing may be null.
 */
#ifndef FASTLORA_H
#define FASTLORA_H

#include <stdint.h>

#define FASTLORA_ABI_VERSION 6

#if defined(__GNUC__)
#define FASTLORA_API __attribute__((visibility("default")))
#else
#define FASTLORA_API
#endif

/* What a function returns. */
#define FASTLORA_OK 0
#define FASTLORA_BAD_ARGUMENT 1 /* a size, stride, dtype or index out of range */
#define FASTLORA_NO_MEMORY 2
#define FASTLORA_NOT_FINITE 3   /* a merged value would not be, or a scaling is not */
#define FASTLORA_NOT_MERGED 4   /* the weight is not what the receipt's merge left */
#define FASTLORA_NOT_RESTORED 5 /* the receipt does not give back the original weight */

#define FASTLORA_LAUNCH_FAILED 6 /* fastlora_cuda_last_error says which kernel's and why */

/* Element types. */
#define FASTLORA_FLOAT32 0
#define FASTLORA_BFLOAT16 1
#define FASTLORA_FLOAT16 2

#ifdef __cplusplus
extern "C" {
#endif

/* Of the CPU library, as everything up to the CUDA library's. */
FASTLORA_API int32_t fastlora_abi_version(void);

/* Names of the instruction sets that the CPU kernels can use here, best first, by commas. */
FASTLORA_API const char* fastlora_cpu_available(void);

/* Why the one of this name cannot be used here: "" where it can be, null where this build has none
 * of the name. */
FASTLORA_API const char* fastlora_cpu_missing(const char* name);

/* The one in use. */
FASTLORA_API const char* fastlora_cpu_current(void);

/* Use the one of this name from now on. */
FASTLORA_API int32_t fastlora_cpu_use(const char* name);

/* y = x W^T + bias + scaling * (h B^T + lora_bias), h = x A^T; where weight is null y += scaling *
 * (h B^T + lora_bias). One rounding. x, weight, bias, y and h are of x_dtype, the adapter of
 * lora_dtype: x_dtype or float32. lora_A and lora_B may have any strides, given for rows and
 * columns. */
FASTLORA_API int32_t fastlora_lora_linear(void* y, int64_t ldy, void* h, int64_t ldh, const void* x,
                                          int64_t ldx, const void* weight, int64_t ldw,
                                          const void* bias, const void* lora_A, int64_t lda,
                                          int64_t lda_column, const void* lora_B, int64_t ldb,
                                          int64_t ldb_column, const void* lora_bias, int64_t M,
                                          int64_t K, int64_t N, int64_t R, float scaling,
                                          int32_t x_dtype, int32_t lora_dtype, int32_t threads);

/* Rows order[starts[s]] ... order[starts[s + 1] - 1] of x have adapter s of S: as above for each,
 * lora_A (S, R, K) and lora_B (S, N, R) with distances lda_slot and ldb_slot of two slots, scaled
 * by scalings[s] * row_scales[row]. ranks (null: all R) says how many of a slot's R ranks count;
 * others are never read into a result. order names each of the M rows once (null: 0, 1, 2, ...),
 * starts[S] is M, and the first starts[0] have no adapter. h is zeroed where no rank counts.
 *
 * Unless page is 0, adapters lie in pages of `page` ranks: lora_A (pages, page, K), lora_B (pages,
 * page, N), distances those of two pages and of two ranks. table (S, R / page): slot s has rank i
 * in row i % page of page table[s, i / page]; one out of range holds nothing. Pages may overlap;
 * only those of slots with rows are read. h is not written then and may be null. */
FASTLORA_API int32_t fastlora_multi_lora_linear(
    void* y, int64_t ldy, void* h, int64_t ldh, const void* x, int64_t ldx, const void* weight,
    int64_t ldw, const void* bias, const void* lora_A, int64_t lda_slot, int64_t lda,
    const void* lora_B, int64_t ldb_slot, int64_t ldb, const int64_t* order, const int64_t* starts,
    const float* scalings, const int32_t* ranks, const float* row_scales, int64_t M, int64_t K,
    int64_t N, int64_t R, int64_t S, const int32_t* table, int64_t table_ld, int64_t pages,
    int64_t page, int32_t x_dtype, int32_t lora_dtype, int32_t threads);

/* Columns of y (M, ldy) += the part of each of `count` slices, whose adapters lie apart: the rows of
 * slices (count, 9) hold lora_A, lda_slot, lda, lora_B, ldb_slot, ldb, the slice's first column of
 * y, its N, and ranks (or 0), pointers as numbers. Everything else as above, without W and pages;
 * h is not handed out. */
FASTLORA_API int32_t fastlora_multi_lora_add(void* y, int64_t ldy, const void* x, int64_t ldx,
                                             const int64_t* slices, int64_t count,
                                             const int64_t* order, const int64_t* starts,
                                             const float* scalings, const float* row_scales,
                                             int64_t M, int64_t K, int64_t R, int64_t S,
                                             int32_t x_dtype, int32_t lora_dtype, int32_t threads);

/* out (R, C) = scaling * left^T right, summed in float32 in the order of the rows: left (M, R) and
 * right (M, C) of dtype, out of out_dtype (dtype or float32) with any strides. */
FASTLORA_API int32_t fastlora_gradient(void* out, int64_t out_row, int64_t out_column,
                                       const void* left, int64_t ld_left, const void* right,
                                       int64_t ld_right, int64_t M, int64_t R, int64_t C,
                                       float scaling, int32_t dtype, int32_t out_dtype,
                                       int32_t threads);

/* out (M, K) = scale * keep * x, or with add out += it, both of dtype. keep is the mask of rows
 * first_row, ... for the seed: see fastlora/backends/dropout.py. threshold: lanes of 16 bits below
 * it drop. */
FASTLORA_API int32_t fastlora_dropout(void* out, int64_t ldo, const void* x, int64_t ldx, int64_t M,
                                      int64_t K, int64_t first_row, int64_t seed, int32_t threshold,
                                      float scale, int32_t add, int32_t dtype, int32_t threads);

/* weight (N, K), any strides, becomes round(weight + d), d = lora_B lora_A in float32: one fused
 * multiply-add a rank, in the order of the ranks. lora_A (R, K) and lora_B (N, R) are contiguous
 * float32, scaling included. *receipt is what undoes it (see below); it is set when the code is
 * FASTLORA_OK, and before the call returns. Null: none is made, the merge is for good. */
FASTLORA_API int32_t fastlora_merge(void* weight, int64_t row, int64_t column, const float* lora_A,
                                    const float* lora_B, int64_t N, int64_t K, int64_t R,
                                    int32_t dtype, int32_t threads, void** receipt);

/* Of a receipt: the number of elements it holds. */
FASTLORA_API int64_t fastlora_receipt_size(const void* receipt);

/* Of a receipt, which is empty afterwards: positions (each in its tile of 65536 elements), their
 * raw bits, how many each tile has, and two checksums, of the merged weight and of all else. */
FASTLORA_API int32_t fastlora_receipt_read(void* receipt, uint16_t* positions, void* bits,
                                           int32_t* counts, int64_t* checksums);

/* weight as it was before the merge that made this receipt, where the caller could not read it;
 * FASTLORA_BAD_ARGUMENT where it has. */
FASTLORA_API int32_t fastlora_receipt_undo(void* weight, int64_t row, int64_t column,
                                           const float* lora_A, const float* lora_B, int64_t N,
                                           int64_t K, int64_t R, int32_t dtype, int32_t threads,
                                           const void* receipt);

FASTLORA_API void fastlora_receipt_free(void* receipt);

/* weight as it was before fastlora_merge with the same adapters. */
FASTLORA_API int32_t fastlora_unmerge(void* weight, int64_t row, int64_t column,
                                      const float* lora_A, const float* lora_B, int64_t N,
                                      int64_t K, int64_t R, int32_t dtype, int32_t threads,
                                      const uint16_t* positions, const void* bits,
                                      const int32_t* counts, int64_t size,
                                      const int64_t* checksums);

/* Of the CUDA library, as all that follows: its version, the architectures in it (800,900 for sm_80
 * and sm_90; host where it runs without a GPU), its compiler, and why the last launch failed. */
FASTLORA_API int32_t fastlora_cuda_abi_version(void);
FASTLORA_API const char* fastlora_cuda_architectures(void);
FASTLORA_API const char* fastlora_cuda_compiler(void);
FASTLORA_API const char* fastlora_cuda_last_error(void);

/* CUDA functions take device pointers of the current device and its stream. They allocate nothing
 * and wait for nothing, so that a CUDA graph can capture them. Pointers are multiples of 16 bytes;
 * K, N, R and all ld* multiples of 8; h and scaled (M, R) are contiguous. */

/* Which kernels run a product: one for few rows, or a shrink and a product whose tiles have so many
 * rows. */
#define FASTLORA_ONE_PASS 0 /* R up to 64, adapters of x_dtype, no dropout */
#define FASTLORA_TILE_64 1
#define FASTLORA_TILE_128 2
#define FASTLORA_TILE_256 3

/* y = x w + scaling * keep * (h b + lora_bias) + bias and h = dropout(x) a. x_dtype is half, that
 * of lora_A, lora_B and lora_bias the same or float32. w is weight (N, K), a lora_A (R, K) and b
 * lora_B (N, R), transposed; or with `transposed`, as the gradient for x has them, w is weight
 * (K, N), a lora_A (K, R) and b lora_B (R, N). seed (one number on the device, or null), threshold
 * and keep_scale as in fastlora_dropout: of x with drops_x, else of the LoRA term. scaled: room for
 * scaling * h where the rank step is to come last, or null. overlap: the kernels side by side. */
FASTLORA_API int32_t fastlora_cuda_lora_linear(
    void* y, int64_t ldy, void* h, void* scaled, const void* x, int64_t ldx, const void* weight,
    int64_t ldw, const void* bias, const void* lora_A, int64_t lda, const void* lora_B, int64_t ldb,
    const void* lora_bias, int64_t M, int64_t K, int64_t N, int64_t R, float scaling,
    const int64_t* seed, int32_t threshold, float keep_scale, int32_t drops_x, int32_t transposed,
    int32_t path, int32_t overlap, int32_t x_dtype, int32_t lora_dtype, void* stream);

/* M up to 64 rows: y = x weight^T + bias + scalings[s] * row_scales[row] * (h b), s = ids[row], or
 * where weight is null y += the last term; h (M, slices * R) is left behind. x_dtype is half, the
 * adapters' the same or float32. Columns up to ends[0], ends[1], ... are of the first, second, ...
 * slice, each with R ranks of its own in lora_A and h. lora_A has columns side by side, lora_B
 * ranks or columns (unit b_rank or b_column); slots S of R ranks, or pages of `page` ranks each,
 * named by table (S, R / page) or null. An id or page out of range is none, ranks (or null) beyond
 * a slot's never count. ends lies on the host, all else on the device. */
FASTLORA_API int32_t fastlora_cuda_multi_lora_decode(
    void* y, int64_t ldy, void* h, const void* x, int64_t ldx, const void* weight, int64_t ldw,
    const void* bias, const void* lora_A, int64_t a_slot, int64_t a_slice, int64_t a_rank,
    const void* lora_B, int64_t b_slot, int64_t b_rank, int64_t b_column, const int32_t* ids,
    const float* scalings, const int32_t* ranks, const float* row_scales, const int32_t* table,
    int64_t table_ld, int64_t pages, int64_t page, const int64_t* ends, int64_t slices, int64_t M,
    int64_t K, int64_t N, int64_t R, int64_t S, int32_t overlap, int32_t x_dtype,
    int32_t lora_dtype, void* stream);

/* What fastlora_cuda_swap does to each tile: takes adapters out, puts others in, keeps what undoes
 * that, checks and makes checksums; whether the old receipt is a pool, and weights lie in chunks:
 * unit columns, K, ld and pointers multiples of 8 elements. */
#define FASTLORA_UNDO 1
#define FASTLORA_MERGE 2
#define FASTLORA_KEEP 4
#define FASTLORA_SUMS 8
#define FASTLORA_POOLED 16
#define FASTLORA_ALIGNED 32

/* Tiles of 64 x 64 of many weights of dtype, those in state `wanted`: see csrc/cuda/merge/merge.h
 * for the tables, states and sums. Adapters to take out are of old_dtype, those to put in of
 * new_dtype, with unit columns. No tile is written whose new state is not 1. */
FASTLORA_API int32_t fastlora_cuda_swap(
    const int64_t* weights, const int64_t* adapters, const float* scales, const int32_t* weight_of,
    int32_t* states, const int64_t* old_sums, const int32_t* old_counts, const int64_t* old_offsets,
    int64_t* sums, int32_t* counts, int64_t* offsets, int64_t* cursor, void* pool, int64_t tiles,
    int64_t capacity, int32_t wanted, int32_t dtype, int32_t old_dtype, int32_t new_dtype,
    int32_t how, void* stream);

/* A receipt's positions and bits from the pool, tile after tile. */
FASTLORA_API int32_t fastlora_cuda_gather(uint16_t* positions, void* bits, const void* pool,
                                          const int64_t* starts, const int64_t* offsets,
                                          const int32_t* counts, int64_t tiles, int32_t dtype,
                                          void* stream);

#ifdef __cplusplus
}
#endif
#endif
