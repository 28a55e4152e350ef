// The threads of a block as fibers of one thread: each runs until it must wait for others.
//
// A fiber is a stack and a place in it (makecontext for the first step, _setjmp and _longjmp for
// all others, which unlike swapcontext make no system call). Fibers take turns in the order of
// their threads, or in a random one: a kernel that lacks a barrier then changes its results.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastlora::host {

constexpr size_t STACK = size_t(256) << 10;

// Where threads wait for each other.
struct Meeting {
    int arrived = 0;
    std::vector<int> waiting;
};

// What the lanes of a warp put in and take out of an instruction that they execute together.
struct Warp {
    Meeting meeting;
    const char* instruction = nullptr;
    alignas(16) unsigned char in[32][64], out[32][64];
};

// An asynchronous copy of 16 bytes that has been asked for.
struct Copy {
    unsigned char* to;
    const unsigned char* from;  // null: zeros
};

struct Fiber {
    jmp_buf place;
    ucontext_t beginning;
    unsigned char* stack = nullptr;
    bool begun = false, ended = false;
    void* fake_stack = nullptr;
    std::vector<std::vector<Copy>> copies{1};  // by group, the last one is open
};

class Block {
  public:
    explicit Block(int threads, uint64_t order)
        : threads_(threads), fibers_(threads), warps_((threads + 31) / 32), random_(order),
          shuffled_(order != 0) {
        for (Fiber& fiber : fibers_)
            fiber.stack = static_cast<unsigned char*>(
                mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    Block(const Block&) = delete;
    ~Block() {
        for (Fiber& fiber : fibers_) munmap(fiber.stack, STACK);
    }

    // Every thread's `body`, to its end; the reason where they cannot all get there.
    std::string run(const std::function<void()>& body);

    int thread() const { return now_; }
    int threads() const { return threads_; }
    Fiber& fiber() { return fibers_[now_]; }

    // Waits for all threads of the block.
    void sync() {
        meet(block_, threads_, [] {});
    }

    // Executes an instruction of a warp: `f` once, with every lane's operands, for every lane's
    // results.
    template <class In, class Out, class F>
    Out together(const char* instruction, const In& in, F f) {
        static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
        Warp& warp = warps_[now_ / 32];
        if (warp.meeting.arrived == 0)
            warp.instruction = instruction;
        else if (std::strcmp(warp.instruction, instruction) != 0)
            fail(std::string("lanes of a warp are at ") + warp.instruction + " and " + instruction);
        std::memcpy(warp.in[now_ % 32], &in, sizeof in);
        meet(warp.meeting, 32, [&] {
            In all[32];
            Out results[32];
            for (int i = 0; i < 32; ++i) std::memcpy(&all[i], warp.in[i], sizeof(In));
            f(all, results);
            for (int i = 0; i < 32; ++i) std::memcpy(warp.out[i], &results[i], sizeof(Out));
        });
        Out out;
        std::memcpy(&out, warp.out[now_ % 32], sizeof out);
        return out;
    }

    // Gives the block up, with a reason.
    [[noreturn]] void fail(const std::string& why) {
        if (failure_.empty()) failure_ = why;
        for (;;) leave();
    }

  private:
    template <class F>
    void meet(Meeting& meeting, int needed, F last) {
        if (++meeting.arrived == needed) {
            last();
            meeting.arrived = 0;
            ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
            meeting.waiting.clear();
            return;
        }
        meeting.waiting.push_back(now_);
        leave();
    }

    int next();
    void enter();
    void leave();
    void live();
    static void begin(unsigned high, unsigned low);

    int threads_, now_ = 0;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    Meeting block_;
    std::vector<int> ready_;
    size_t first_ = 0;  // of ready_, those before have been
    std::mt19937_64 random_;
    bool shuffled_;
    const std::function<void()>* body_ = nullptr;
    std::string failure_;
    jmp_buf home_;
    const void* home_stack_ = nullptr;
    size_t home_size_ = 0;
    void* home_fake_ = nullptr;
};

}  // namespace fastlora::host
