// A GPU made of one thread: the twin of ../machine.h, name by name.
//
// Blocks run one after another, threads are fibers (fibers.h). What a GPU leaves open is left open
// here too, in the worst way: shared memory begins as NaN, an asynchronous copy is NaN until it is
// waited for, a launch that may run beside its predecessor runs before it until it waits. Operands
// of a warp's instructions lie as the figures of "Matrix Fragments for mma.m16n8k16" and of
// "ldmatrix" in NVIDIA's PTX ISA manual say.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>

#include "cuda/launch.h"
#include "cuda/machine/host/fibers.h"
#include "cuda/machine/host/numbers.h"

#define FL_DEVICE inline
#define FL_KERNEL(threads, blocks) void
#define FL_PARAMETERS const

namespace fastlora {
namespace host {

// The block that runs.
struct Running {
    Block* block = nullptr;
    int64_t at[3] = {0, 0, 0};
    unsigned char* shared = nullptr;
};

struct Machine {
    std::recursive_mutex alone;
    Running now;
    uint64_t order = 0;             // 0: fibers and blocks in order, else the seed of a random one
    std::function<int()> previous;  // a launch that has yet to run
};

inline Machine machine;

// Poison: NaN in every floating-point type.
inline void poison(void* p, size_t bytes) { std::memset(p, 0xFF, bytes); }

template <class F>
int run_grid(const char* name, const Launch& how, F kernel) {
    const Running before = machine.now;
    std::vector<int64_t> blocks(how.x * how.y * how.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (machine.order) std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(machine.order));
    // Of just this size, so that a sanitizer sees what goes past it.
    std::unique_ptr<unsigned char, void (*)(void*)> shared(
        static_cast<unsigned char*>(std::aligned_alloc(128, tiles(how.shared, 128) * 128)), free);
    Block block(how.threads, machine.order);
    std::string failure;
    for (const int64_t i : blocks) {
        machine.now = {&block, {i % how.x, i / how.x % how.y, i / how.x / how.y}, shared.get()};
        poison(shared.get(), how.shared);
        failure = block.run(kernel);
        if (!failure.empty()) break;
    }
    machine.now = before;
    return failure.empty() ? FASTLORA_OK : failed(name, failure.c_str());
}

inline int run_previous() {
    if (!machine.previous) return FASTLORA_OK;
    const std::function<int()> run = std::move(machine.previous);
    machine.previous = nullptr;
    return run();
}

struct Nothing {};

}  // namespace host

FL_DEVICE int thread() { return host::machine.now.block->thread(); }
FL_DEVICE int lane() { return thread() % 32; }
FL_DEVICE int warp() { return thread() / 32; }
FL_DEVICE int block(int dimension = 0) { return int(host::machine.now.at[dimension]); }
FL_DEVICE unsigned char* shared_memory() { return host::machine.now.shared; }

FL_DEVICE void load_global(uint32_t (&words)[4], const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        host::machine.now.block->fail("ld.global.v4: an address is no multiple of 16");
    std::memcpy(words, p, 16);
}

FL_DEVICE void store_global(void* p, const uint32_t (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        host::machine.now.block->fail("st.global.v4: an address is no multiple of 16");
    std::memcpy(p, words, 16);
}

FL_DEVICE void sync_block() { host::machine.now.block->sync(); }

FL_DEVICE void sync_warp() {
    host::machine.now.block->together<host::Nothing, host::Nothing>(
        "bar.warp.sync", {}, [](const host::Nothing*, host::Nothing*) {});
}

FL_DEVICE void copy_async(void* to, const void* from, bool there) {
    if ((reinterpret_cast<uintptr_t>(to) | (there ? reinterpret_cast<uintptr_t>(from) : 0)) % 16)
        host::machine.now.block->fail("cp.async: an address is no multiple of 16");
    host::poison(to, 16);
    host::machine.now.block->fiber().copies.back().push_back(
        {static_cast<unsigned char*>(to),
         there ? static_cast<const unsigned char*>(from) : nullptr});
}

FL_DEVICE void copies_commit() { host::machine.now.block->fiber().copies.emplace_back(); }

template <int PENDING>
FL_DEVICE void copies_wait() {
    auto& groups = host::machine.now.block->fiber().copies;
    const size_t done = groups.size() - 1 > PENDING ? groups.size() - 1 - PENDING : 0;
    for (size_t g = 0; g < done; ++g)
        for (const host::Copy& copy : groups[g]) {
            if (copy.from)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}

namespace host {

struct Four {
    uint32_t m[4];
};

template <bool TRANSPOSED>
Four matrices(const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
        machine.now.block->fail("ldmatrix: an address is no multiple of 16");
    return machine.now.block->together<const uint16_t*, Four>(
        TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", static_cast<const uint16_t*>(row),
        [](const uint16_t* const* rows, Four* out) {
            for (int t = 0; t < 32; ++t)
                for (int j = 0; j < 4; ++j) {
                    const int i = t / 4, k = t % 4 * 2;
                    const uint16_t* const* m = rows + 8 * j;
                    const uint32_t low = TRANSPOSED ? m[k][i] : m[i][k];
                    const uint32_t high = TRANSPOSED ? m[k + 1][i] : m[i][k + 1];
                    out[t].m[j] = low | high << 16;
                }
        });
}

struct Factors {
    float d[4];
    uint32_t a[4], b[2];
};
struct Sums {
    float d[4];
};

}  // namespace host

FL_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
    const host::Four four = host::matrices<false>(row);
    std::copy(four.m, four.m + 4, m);
}

FL_DEVICE void load_transposed(uint32_t (&m)[4], const void* row) {
    const host::Four four = host::matrices<true>(row);
    std::copy(four.m, four.m + 4, m);
}

// A tensor core's sum has no order to speak of; here it is exact and rounded once.
template <bool BFLOAT16>
FL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const host::Factors in = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto all = [](const host::Factors* in, host::Sums* out) {
        const auto half = [](uint32_t word, int i) {
            const uint16_t raw = uint16_t(word >> (16 * i));
            return double(BFLOAT16 ? host::from_bfloat16(raw) : host::from_float16(raw));
        };
        double A[16][16], B[16][8];
        for (int t = 0; t < 32; ++t) {
            const int g = t / 4, q = t % 4 * 2;
            for (int i = 0; i < 2; ++i) {
                A[g][q + i] = half(in[t].a[0], i);
                A[g + 8][q + i] = half(in[t].a[1], i);
                A[g][q + 8 + i] = half(in[t].a[2], i);
                A[g + 8][q + 8 + i] = half(in[t].a[3], i);
                B[q + i][g] = half(in[t].b[0], i);
                B[q + 8 + i][g] = half(in[t].b[1], i);
            }
        }
        for (int t = 0; t < 32; ++t)
            for (int i = 0; i < 4; ++i) {
                const int m = t / 4 + i / 2 * 8, n = t % 4 * 2 + i % 2;
                double sum = in[t].d[i];
                for (int k = 0; k < 16; ++k) sum += A[m][k] * B[k][n];
                out[t].d[i] = float(sum);
            }
    };
    const char* name = BFLOAT16 ? "mma.bf16" : "mma.f16";
    const host::Sums sums =
        host::machine.now.block->together<host::Factors, host::Sums>(name, in, all);
    std::copy(sums.d, sums.d + 4, d);
}

namespace host {

template <class V>
struct From {
    V value;
    int lane;
};

template <class V>
V shuffle(const char* name, V value, int lane) {
    const auto all = [](const From<V>* in, V* out) {
        for (int t = 0; t < 32; ++t) out[t] = in[in[t].lane].value;
    };
    return machine.now.block->together<From<V>, V>(name, {value, lane}, all);
}

}  // namespace host

template <class V>
FL_DEVICE V shuffle_xor(V value, int mask) {
    return host::shuffle("shfl.bfly", value, lane() ^ mask);
}

template <class V>
FL_DEVICE V shuffle_up(V value, int distance) {
    return host::shuffle("shfl.up", value, lane() < distance ? lane() : lane() - distance);
}

FL_DEVICE void dependents_may_begin() {}

FL_DEVICE void wait_for_previous() {
    if (host::run_previous() != FASTLORA_OK)
        host::machine.now.block->fail("the launch before this one failed");
}

FL_DEVICE int64_t atomic_add(int64_t* to, int64_t value) {
    const int64_t before = *to;
    *to += value;
    return before;
}

// A first launch runs when the second one waits for it, or has ended.
template <auto KERNEL, class P>
int launch(const char* name, const Launch& how, const P& parameters) {
    const std::lock_guard<std::recursive_mutex> lock(host::machine.alone);
    if (how.x == 0 || how.y == 0 || how.z == 0) return FASTLORA_OK;
    const auto run = [=] { return host::run_grid(name, how, [=] { KERNEL(parameters); }); };
    if (how.first) {
        host::machine.previous = run;
        return FASTLORA_OK;
    }
    const int code = run();
    const int other = host::run_previous();
    return code == FASTLORA_OK ? other : code;
}

}  // namespace fastlora
