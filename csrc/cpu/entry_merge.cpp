// The C functions that merge and undo it.
#include <cstring>
#include <memory>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/arguments.h"
#include "cpu/choices.h"

namespace {

using namespace fastlora;

bool merge_arguments(const MergeArgs& a) {
    return sizes({a.N, a.K, a.R}) && count(a.threads) && readable(a.weight, a.N, a.K) &&
           readable(a.A, a.R, a.K) && readable(a.B, a.N, a.R);
}

uint64_t factors(const MergeArgs& a) {
    const auto digest = current.load()->digest;
    const uint64_t shape = (uint64_t(a.N) * 31 + a.K) * 31 + a.R;
    return digest(a.A, a.R * a.K * 4, shape) + digest(a.B, a.N * a.R * 4, ~shape);
}

// The checksum of all that a receipt holds beside the checksum of the weight.
uint64_t contents(const uint16_t* positions, const void* bits, const int32_t* counts, int64_t size,
                  int64_t element_size, int64_t tiles) {
    const auto digest = current.load()->digest;
    return digest(positions, size * 2, 1) + 3 * digest(bits, size * element_size, 2) +
           5 * digest(counts, tiles * 4, 3);
}

}  // namespace

extern "C" {

int32_t fastlora_merge(void* weight, int64_t row, int64_t column, const float* lora_A,
                       const float* lora_B, int64_t N, int64_t K, int64_t R, int32_t dtype,
                       int32_t threads, void** receipt) {
    const MergeArgs args{weight, row, column, N, K, R, lora_A, lora_B, dtype, threads};
    if (!merge_arguments(args) || dtype < FASTLORA_FLOAT32 || dtype > FASTLORA_FLOAT16)
        return FASTLORA_BAD_ARGUMENT;
    return guarded([&] {
        if (!receipt && current.load()->merge_without_receipt(args)) return FASTLORA_OK;
        std::unique_ptr<Receipt> made(new Receipt);
        made->factors = factors(args);
        const int32_t code = current.load()->merge(args, *made);
        if (code == FASTLORA_OK && receipt) *receipt = made.release();
        return code;
    });
}

int64_t fastlora_receipt_size(const void* receipt) {
    int64_t size = 0;
    if (receipt)
        for (const auto& tile : static_cast<const Receipt*>(receipt)->tiles) size += tile.size;
    return size;
}

// Gives free pages back to the system, or a receipt would be held twice while it is read: glibc,
// once it has freed a large block, keeps up to 64 MB of small ones.
static void trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

int32_t fastlora_receipt_read(void* receipt, uint16_t* positions, void* bits, int32_t* counts,
                              int64_t* checksums) {
    if (!receipt || !checksums) return FASTLORA_BAD_ARGUMENT;
    auto& held = *static_cast<Receipt*>(receipt);
    const int64_t tiles = int64_t(held.tiles.size()), size = fastlora_receipt_size(receipt);
    auto* raw = static_cast<unsigned char*>(bits);
    uint64_t merged = 0;
    // From the last: what was allocated last is freed first, so that its pages become free.
    for (int64_t i = tiles, at = size; i-- > 0;) {
        const auto tile = std::move(held.tiles[i]);
        held.tiles.pop_back();
        at -= tile.size;
        if (tile.size) {
            std::memcpy(positions + at, tile.positions.data(), tile.size * sizeof *positions);
            std::memcpy(raw + at * held.element_size, tile.bits.data(),
                        tile.size * held.element_size);
        }
        counts[i] = int32_t(tile.size);
        merged += tile.checksum;
        if (i % 128 == 0) trim();
    }
    checksums[0] = int64_t(merged);
    checksums[1] =
        int64_t(held.factors + contents(positions, bits, counts, size, held.element_size, tiles));
    return FASTLORA_OK;
}

int32_t fastlora_receipt_undo(void* weight, int64_t row, int64_t column, const float* lora_A,
                              const float* lora_B, int64_t N, int64_t K, int64_t R, int32_t dtype,
                              int32_t threads, const void* receipt) {
    const MergeArgs args{weight, row, column, N, K, R, lora_A, lora_B, dtype, threads};
    const auto* held = static_cast<const Receipt*>(receipt);
    if (!held || !merge_arguments(args) || int64_t(held->tiles.size()) != Tiles(N, K).count ||
        held->element_size != element_size(dtype))
        return FASTLORA_BAD_ARGUMENT;
    return guarded([&] { return current.load()->undo(args, *held); });
}

void fastlora_receipt_free(void* receipt) { delete static_cast<Receipt*>(receipt); }

int32_t fastlora_unmerge(void* weight, int64_t row, int64_t column, const float* lora_A,
                         const float* lora_B, int64_t N, int64_t K, int64_t R, int32_t dtype,
                         int32_t threads, const uint16_t* positions, const void* bits,
                         const int32_t* counts, int64_t size, const int64_t* checksums) {
    const MergeArgs args{weight, row, column, N, K, R, lora_A, lora_B, dtype, threads};
    if (!merge_arguments(args) || !sizes({size}) || !checksums) return FASTLORA_BAD_ARGUMENT;
    const int64_t tiles = Tiles(N, K).count;
    int64_t sum = 0;
    for (int64_t i = 0; i < tiles; ++i) {
        if (!counts || counts[i] < 0) return FASTLORA_BAD_ARGUMENT;
        sum += counts[i];
    }
    if (sum != size || (size && (!positions || !bits))) return FASTLORA_BAD_ARGUMENT;
    if (dtype < FASTLORA_FLOAT32 || dtype > FASTLORA_FLOAT16) return FASTLORA_BAD_ARGUMENT;
    const uint64_t held = contents(positions, bits, counts, size, element_size(dtype), tiles);
    const uint64_t merged = uint64_t(checksums[0]);
    return guarded([&] {
        // A weight that is not this receipt's is the likelier mistake, and is named first.
        const bool whole = uint64_t(checksums[1]) == factors(args) + held;
        return current.load()->unmerge(args, {positions, bits, counts, merged, whole});
    });
}

}  // extern "C"
