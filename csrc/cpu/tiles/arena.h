// Memory that a calling thread keeps from one call to the next, in huge pages where there are any:
// rows of a power of two bytes otherwise meet in one set of a cache, and fresh pages cost a fault.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastlora::FL_ISA {

class Arena {
  public:
    // At least so many bytes, whatever they hold.
    char* take(int64_t bytes) {
        if (bytes > size) {
            release();
            constexpr int64_t HUGE_PAGE = 1 << 21;
            const int64_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            memory = static_cast<char*>(std::aligned_alloc(HUGE_PAGE, rounded));
            if (!memory) throw std::bad_alloc();
            size = rounded;
#ifdef MADV_HUGEPAGE
            madvise(memory, rounded, MADV_HUGEPAGE);
#endif
        }
        return memory;
    }
    // What a usual layer does not need is not kept.
    void trim() {
        if (size > KEPT) release();
    }
    ~Arena() { release(); }

  private:
    static constexpr int64_t KEPT = 64 << 20;
    char* memory = nullptr;
    int64_t size = 0;

    void release() {
        std::free(memory);
        memory = nullptr;
        size = 0;
    }
};

}  // namespace fastlora::FL_ISA
