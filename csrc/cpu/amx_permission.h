// Whether this process may use AMX tiles: the CPU, the kernel and a permission asked for once.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora {

// Why not, or null. The permission is the process's: threads and children have it too.
inline const char* amx_missing() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22, OSXSAVE = 1u << 27;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & BF16))
        return "the CPU has no AMX tiles with BF16 products";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE))
        return "the system does not save extended registers";
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned TILE_STATE = 3u << 17;
    if ((low & TILE_STATE) != TILE_STATE) return "the system does not save AMX tiles";
    // Linux keeps tile state from processes that did not ask (Documentation/arch/x86/xstate.rst).
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA))
        return "the system refuses the permission for AMX tiles (arch_prctl)";
    return nullptr;
#else
    return "AMX tiles are used on Linux alone";
#endif
}

}  // namespace fastlora
