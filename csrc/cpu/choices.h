// The instruction sets of this build, and the one in use.
#pragma once

#include <atomic>
#include <vector>

#include "fastlora.h"
#include "cpu/amx_permission.h"
#include "cpu/table.h"

namespace fastlora {

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

inline std::vector<Choice> choices() {
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

inline const std::vector<Choice> all_choices = choices();

// Those that can be used, null behind the last.
inline std::vector<const Table*> usable() {
    std::vector<const Table*> tables;
    for (const Choice& choice : all_choices)
        if (!choice.missing) tables.push_back(choice.table);
    tables.push_back(nullptr);
    return tables;
}

inline const std::vector<const Table*> tables = usable();
inline std::atomic<const Table*> current{tables[0]};

}  // namespace fastlora
