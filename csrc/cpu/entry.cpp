// The C functions, all but those that merge: what must hold is checked here, the rest is the
// instruction set's.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/choices.h"

namespace {

using namespace fastlora;

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

int32_t fastlora_multi_lora_add(void* y, int64_t ldy, const void* x, int64_t ldx,
                                const int64_t* slices, int64_t count, const int64_t* order,
                                const int64_t* starts, const float* scalings,
                                const float* row_scales, int64_t M, int64_t K, int64_t R, int64_t S,
                                int32_t x_dtype, int32_t lora_dtype, int32_t threads) {
    if (!sizes({M, R, count}) || (count && !slices)) return FASTLORA_BAD_ARGUMENT;
    return guarded([&] {
        // Of the widest element; kept, since a step of a decoder makes a hundred such calls.
        static thread_local std::vector<float> h;
        if (int64_t(h.size()) < M * R) h.resize(M * R);
        int32_t code = FASTLORA_OK;
        for (int64_t i = 0; i < count && code == FASTLORA_OK; ++i) {
            const int64_t* s = slices + 9 * i;
            char* columns = static_cast<char*>(y) + s[6] * element_size(x_dtype);
            // clang-format off
            code = fastlora_multi_lora_linear(
                columns, ldy, h.data(), R, x, ldx, nullptr, 0, nullptr,
                reinterpret_cast<const void*>(s[0]), s[1], s[2],
                reinterpret_cast<const void*>(s[3]), s[4], s[5], order, starts, scalings,
                reinterpret_cast<const int32_t*>(s[8]), row_scales, M, K, s[7], R, S,
                nullptr, 0, 0, 0, x_dtype, lora_dtype, threads);
            // clang-format on
        }
        return code;
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

}  // extern "C"
