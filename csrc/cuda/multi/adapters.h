// Which adapter a row has, and where that adapter lies: what the kernels of few rows share.
#pragma once

#include "cuda/tile/tile.h"

namespace fastlora {

// Up to this many slices of columns has a packed projection.
constexpr int SLICES = 8;

// Rows (T,) of slots (S,): ids and pages out of range are none, ranks beyond a slot's are not read.
// a has a row of K for each rank, slice after slice; b any of rank or column side by side. In slots
// of R ranks, or in pages of `page` ranks that a table (S, table_ld) names.
struct Adapters {
    const void *a, *b;
    int64_t a_slot, a_slice, a_rank, b_slot, b_rank, b_column;
    const int32_t *ids, *ranks, *table;  // ranks, table: null if not given
    const float *scalings, *row_scales;  // row_scales: null if not given
    int64_t table_ld, pages;
    int S, R, page, slices;
    int64_t ends[SLICES];
};

FL_DEVICE int slot_of(const Adapters& p, int64_t row) {
    const int id = p.ids[row];
    return id >= 0 && id < p.S ? id : -1;
}

FL_DEVICE int ranks_of(const Adapters& p, int slot) {
    if (slot < 0) return 0;
    const int r = p.ranks ? p.ranks[slot] : p.R;
    return r < 0 ? 0 : r < p.R ? r : p.R;
}

FL_DEVICE float factor_of(const Adapters& p, int slot, int64_t row) {
    return p.row_scales ? p.scalings[slot] * p.row_scales[row] : p.scalings[slot];
}

// The slot or page that holds a rank, and the rank's place in it; false where that is none.
FL_DEVICE bool find(const Adapters& p, int slot, int rank, int64_t& holder, int& within) {
    holder = slot, within = rank;
    if (!p.table) return true;
    holder = p.table[slot * p.table_ld + rank / p.page];
    within = rank % p.page;
    return holder >= 0 && holder < p.pages;
}

FL_DEVICE int slice_of(const Adapters& p, int64_t column) {
    int slice = 0;
    while (slice < p.slices - 1 && column >= p.ends[slice]) ++slice;
    return slice;
}

}  // namespace fastlora
