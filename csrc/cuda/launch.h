// Launches a kernel, and notes why when it cannot be launched.
#pragma once

#include <cstdint>
#include <string>

#include "fastlora.h"

namespace fastlora {

struct Launch {
    int64_t x, y, z;      // blocks
    int threads, shared;  // of a block; bytes
    void* stream;
    // Of two launches the first, or the second, which from Hopper on may begin while the first one
    // still runs: it waits before it reads what that one writes.
    bool first = false, beside = false;
};

// The last failure of a thread, for whoever got its code.
inline std::string& last_failure() {
    static thread_local std::string text;
    return text;
}

inline int failed(const char* kernel, const char* why) {
    last_failure() = std::string(kernel) + ": " + why;
    return FASTLORA_LAUNCH_FAILED;
}

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace fastlora
