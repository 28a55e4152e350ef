// The kernels of one instruction set as a table of functions; kernels.cpp fills one for each set.
#pragma once

#include <cstdint>

#include "cpu/merge/receipt.h"

namespace fastlora {

struct LinearArgs {
    void *y, *h;
    const void *x, *weight, *bias, *A, *B, *lora_bias;
    int64_t ldy, ldh, ldx, ldw, lda_slot, lda, lda_column, ldb_slot, ldb, ldb_column;
    const int64_t *order, *starts;
    const int32_t* ranks;
    const float *scalings, *row_scales;
    int64_t M, K, N, R, S;
    int32_t x_dtype, lora_dtype, threads;
    // Of adapters in pages, unless page is 0: slots' distances are pages' then, B's rows ranks.
    const int32_t* table = nullptr;
    int64_t table_ld = 0, pages = 0, page = 0;
};

struct GradientArgs {
    void* out;
    const void *left, *right;
    int64_t out_row, out_column, ld_left, ld_right, M, R, C;
    float scaling;
    int32_t dtype, out_dtype, threads;
};

struct DropoutArgs {
    void* out;
    const void* x;
    int64_t ldo, ldx, M, K, first_row;
    uint64_t seed;
    uint32_t threshold;
    float scale;
    bool add;
    int32_t dtype, threads;
};

struct MergeArgs {
    void* weight;
    int64_t row, column, N, K, R;
    const float *A, *B;
    int32_t dtype, threads;
};

struct ReceiptArgs {
    const uint16_t* positions;
    const void* bits;
    const int32_t* counts;
    uint64_t merged;  // checksum of the merged weight
    bool whole;       // its own checksum is right
};

// Every function returns a code of fastlora.h; memory that runs out is thrown as std::bad_alloc.
struct Table {
    const char* name;
    int32_t (*linear)(const LinearArgs&);
    int32_t (*gradient)(const GradientArgs&);
    int32_t (*dropout)(const DropoutArgs&);
    int32_t (*merge)(const MergeArgs&, Receipt&);
    // False, nothing done, where a value might not be finite.
    bool (*merge_without_receipt)(const MergeArgs&);
    int32_t (*undo)(const MergeArgs&, const Receipt&);
    int32_t (*unmerge)(const MergeArgs&, const ReceiptArgs&);
    // A checksum of bytes whose first word has the number `first`.
    uint64_t (*digest)(const void*, int64_t bytes, uint64_t first);
};

namespace portable {
extern const Table table;
}
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
namespace avx512_bf16 {
extern const Table table;
}

// What sets with tiles do by them: calls of bfloat16 rows.
struct TileTable {
    int32_t (*linear)(const LinearArgs&);
    int32_t (*gradient)(const GradientArgs&);
};
namespace amx_bf16 {
extern const TileTable tile_table;
}
namespace amx_emulated {
extern const TileTable tile_table;
}

}  // namespace fastlora
