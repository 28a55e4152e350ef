// The C functions: what must hold is checked here, the rest is the instruction set's.
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "fastlora.h"
#include "cpu/amx_permission.h"
#include "cpu/table.h"

namespace {

using namespace fastlora;

// Every set of this build, best first, and why this machine cannot use it, or null. The last one is
// for tests: slower than any other.
struct Choice {
    const Table* table;
    const char* missing;
};

// A set with tiles for bfloat16 rows, another one's kernels for the rest.
template <const Table& others, const TileTable& tiles>
const Table* with_tiles(const char* name) {
    static const Table table = [name] {
        Table all = others;
        all.name = name;
        all.linear = [](const LinearArgs& a) {
            return a.x_dtype == FASTLORA_BFLOAT16 ? tiles.linear(a) : others.linear(a);
        };
        all.gradient = [](const GradientArgs& a) {
            return a.dtype == FASTLORA_BFLOAT16 ? tiles.gradient(a) : others.gradient(a);
        };
        return all;
    }();
    return &table;
}

std::vector<Choice> choices() {
    std::vector<Choice> all;
#ifdef FL_HAS_AVX2
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    [[maybe_unused]] const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef FL_HAS_AMX_BF16
    const char* none = "the CPU has no AVX-512 with BF16 instructions";
    const Table* amx = with_tiles<avx512_bf16::table, amx_bf16::tile_table>("amx_bf16");
    all.push_back({amx, bf16 ? amx_missing() : none});
#endif
#ifdef FL_HAS_AVX512_BF16
    all.push_back({&avx512_bf16::table, bf16 ? nullptr : "the CPU has no AVX512_BF16"});
#endif
#ifdef FL_HAS_AVX512
    all.push_back({&avx512::table, avx512 ? nullptr : "the CPU has no AVX-512"});
#endif
    const char* old = "the CPU has no AVX2";
    all.push_back({&avx2::table, avx2 ? nullptr : old});
#endif
    all.push_back({&portable::table, nullptr});
#if defined(FL_HAS_AVX2) && defined(FL_HAS_AMX_EMULATED)
    const Table* emulated = with_tiles<avx2::table, amx_emulated::tile_table>("amx_emulated");
    all.push_back({emulated, avx2 ? nullptr : old});
#endif
    return all;
}

const std::vector<Choice> all_choices = choices();

// Those that can be used, null behind the last.
std::vector<const Table*> usable() {
    std::vector<const Table*> tables;
    for (const Choice& choice : all_choices)
        if (!choice.missing) tables.push_back(choice.table);
    tables.push_back(nullptr);
    return tables;
}

const std::vector<const Table*> tables = usable();
std::atomic<const Table*> current{tables[0]};

bool sizes(std::initializer_list<int64_t> values) {
    for (int64_t value : values)
        if (value < 0 || value > int64_t(1) << 40) return false;
    return true;
}

// A number of threads; more than any machine has cores is a mistake.
bool count(int32_t threads) { return threads >= 1 && threads <= 4096; }

// A matrix of `rows` rows whose distance is `stride`, `columns` wide.
bool matrix(const void* p, int64_t rows, int64_t columns, int64_t stride) {
    if (rows == 0 || columns == 0) return true;
    return p && (rows == 1 || stride >= columns || stride <= -columns);
}

// The same, where rows may overlap: it is only read.
bool readable(const void* p, int64_t rows, int64_t columns) {
    return rows == 0 || columns == 0 || p;
}

bool dense(const LinearArgs& a) {
    return matrix(a.h, a.M, a.R, a.ldh) && readable(a.A, a.S * a.R, a.K) &&
           readable(a.B, a.S * a.N, a.R);
}

bool paged(const LinearArgs& a) {
    return sizes({a.pages, a.page}) && a.R % a.page == 0 && readable(a.table, a.S, a.R / a.page) &&
           readable(a.A, a.pages, a.K) && readable(a.B, a.pages, a.N);
}

int32_t checked(const LinearArgs& a) {
    if (!sizes({a.M, a.K, a.N, a.R, a.S}) || !count(a.threads)) return FASTLORA_BAD_ARGUMENT;
    if (!matrix(a.y, a.M, a.N, a.ldy) || !readable(a.x, a.M, a.K) || !a.starts ||
        (a.S && !a.scalings) || !(a.page ? paged(a) : dense(a)))
        return FASTLORA_BAD_ARGUMENT;
    if (a.starts[0] < 0) return FASTLORA_BAD_ARGUMENT;
    for (int64_t s = 0; s < a.S; ++s)
        if (a.starts[s] > a.starts[s + 1]) return FASTLORA_BAD_ARGUMENT;
    if (a.starts[a.S] != a.M) return FASTLORA_BAD_ARGUMENT;
    for (int64_t i = 0; a.order && i < a.M; ++i)
        if (a.order[i] < 0 || a.order[i] >= a.M) return FASTLORA_BAD_ARGUMENT;
    if (a.M == 0 || (a.N == 0 && a.R == 0)) return FASTLORA_OK;
    return current.load()->linear(a);
}

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

int64_t element_size(int32_t dtype) { return dtype == FASTLORA_FLOAT32 ? 4 : 2; }

template <class Call>
int32_t guarded(Call call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return FASTLORA_NO_MEMORY;
    } catch (...) {
        return FASTLORA_BAD_ARGUMENT;
    }
}

}  // namespace

extern "C" {

int32_t fastlora_abi_version(void) { return FASTLORA_ABI_VERSION; }

const char* fastlora_cpu_available(void) {
    static const std::string names = [] {
        std::string all;
        for (int i = 0; tables[i]; ++i) all += (i ? "," : "") + std::string(tables[i]->name);
        return all;
    }();
    return names.c_str();
}

const char* fastlora_cpu_current(void) { return current.load()->name; }

const char* fastlora_cpu_missing(const char* name) {
    for (const Choice& choice : all_choices)
        if (name && !std::strcmp(choice.table->name, name))
            return choice.missing ? choice.missing : "";
    return nullptr;
}

int32_t fastlora_cpu_use(const char* name) {
    for (int i = 0; name && tables[i]; ++i)
        if (!std::strcmp(tables[i]->name, name)) {
            current = tables[i];
            return FASTLORA_OK;
        }
    return FASTLORA_BAD_ARGUMENT;
}

int32_t fastlora_lora_linear(void* y, int64_t ldy, void* h, int64_t ldh, const void* x, int64_t ldx,
                             const void* weight, int64_t ldw, const void* bias, const void* lora_A,
                             int64_t lda, int64_t lda_column, const void* lora_B, int64_t ldb,
                             int64_t ldb_column, const void* lora_bias, int64_t M, int64_t K,
                             int64_t N, int64_t R, float scaling, int32_t x_dtype,
                             int32_t lora_dtype, int32_t threads) {
    // One adapter, which every row has.
    const int64_t starts[2] = {0, M};
    return guarded([&] {
        // clang-format off
        return checked({y, h, x, weight, bias, lora_A, lora_B, lora_bias, ldy, ldh, ldx, ldw,
                        0, lda, lda_column, 0, ldb, ldb_column, nullptr, starts, nullptr, &scaling,
                        nullptr, M, K, N, R, 1, x_dtype, lora_dtype, threads});
        // clang-format on
    });
}

int32_t fastlora_multi_lora_linear(
    void* y, int64_t ldy, void* h, int64_t ldh, const void* x, int64_t ldx, const void* weight,
    int64_t ldw, const void* bias, const void* lora_A, int64_t lda_slot, int64_t lda,
    const void* lora_B, int64_t ldb_slot, int64_t ldb, const int64_t* order, const int64_t* starts,
    const float* scalings, const int32_t* ranks, const float* row_scales, int64_t M, int64_t K,
    int64_t N, int64_t R, int64_t S, const int32_t* table, int64_t table_ld, int64_t pages,
    int64_t page, int32_t x_dtype, int32_t lora_dtype, int32_t threads) {
    for (int64_t s = 0; scalings && starts && s < S; ++s)
        if (starts[s] < starts[s + 1] && !std::isfinite(scalings[s])) return FASTLORA_NOT_FINITE;
    return guarded([&] {
        // clang-format off
        return checked({y, h, x, weight, bias, lora_A, lora_B, nullptr, ldy, ldh, ldx, ldw,
                        lda_slot, lda, 1, ldb_slot, ldb, 1, order, starts, ranks, scalings,
                        row_scales, M, K, N, R, S, x_dtype, lora_dtype, threads,
                        table, table_ld, pages, page});
        // clang-format on
    });
}

int32_t fastlora_gradient(void* out, int64_t out_row, int64_t out_column, const void* left,
                          int64_t ld_left, const void* right, int64_t ld_right, int64_t M,
                          int64_t R, int64_t C, float scaling, int32_t dtype, int32_t out_dtype,
                          int32_t threads) {
    if (!sizes({M, R, C}) || !count(threads) || !readable(out, R, C) || !readable(left, M, R) ||
        !readable(right, M, C))
        return FASTLORA_BAD_ARGUMENT;
    return guarded([&] {
        return current.load()->gradient({out, left, right, out_row, out_column, ld_left, ld_right,
                                         M, R, C, scaling, dtype, out_dtype, threads});
    });
}

int32_t fastlora_dropout(void* out, int64_t ldo, const void* x, int64_t ldx, int64_t M, int64_t K,
                         int64_t first_row, int64_t seed, int32_t threshold, float scale,
                         int32_t add, int32_t dtype, int32_t threads) {
    if (!sizes({M, K, first_row}) || !count(threads) || !readable(out, M, K) ||
        !readable(x, M, K) || threshold < 0 || threshold > 65536)
        return FASTLORA_BAD_ARGUMENT;
    return guarded([&] {
        return current.load()->dropout({out, x, ldo, ldx, M, K, first_row, uint64_t(seed),
                                        uint32_t(threshold), scale, add != 0, dtype, threads});
    });
}

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
