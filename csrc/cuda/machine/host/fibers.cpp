// How fibers take turns: see fibers.h.
#include "cuda/machine/host/fibers.h"

namespace fastlora::host {

std::string Block::run(const std::function<void()>& body) {
    body_ = &body;
    failure_.clear();
    block_ = Meeting();
    for (Warp& warp : warps_) warp.meeting = Meeting();
    ready_.clear();
    first_ = 0;
    for (int t = 0; t < threads_; ++t) {
        fibers_[t].ended = false;
        fibers_[t].copies.assign(1, {});
        ready_.push_back(t);
    }
    while (first_ < ready_.size() && failure_.empty()) {
        now_ = next();
        enter();
    }
    int ended = 0;
    for (const Fiber& fiber : fibers_) ended += fiber.ended;
    if (failure_.empty() && ended < threads_)
        failure_ = std::to_string(threads_ - ended) + " of " + std::to_string(threads_) +
                   " threads wait for others that have ended or wait elsewhere";
    // Fibers in the middle of something must not be gone on with.
    if (!failure_.empty())
        for (Fiber& fiber : fibers_) fiber.begun = false;
    return failure_;
}

int Block::next() {
    if (shuffled_) {
        const size_t i = first_ + random_() % (ready_.size() - first_);
        std::swap(ready_[first_], ready_[i]);
    }
    const int t = ready_[first_++];
    if (first_ == ready_.size()) {
        ready_.clear();
        first_ = 0;
    }
    return t;
}

// Home to the fiber whose turn it is; comes back when that one leaves.
__attribute__((noinline)) void Block::enter() {
    Fiber& fiber = fibers_[now_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&home_fake_, fiber.stack, STACK);
#endif
    if (_setjmp(home_) == 0) {
        if (fiber.begun) _longjmp(fiber.place, 1);
        fiber.begun = true;
        getcontext(&fiber.beginning);
        fiber.beginning.uc_stack.ss_sp = fiber.stack;
        fiber.beginning.uc_stack.ss_size = STACK;
        fiber.beginning.uc_link = nullptr;
        const uint64_t self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.beginning, reinterpret_cast<void (*)()>(&Block::begin), 2,
                    unsigned(self >> 32), unsigned(self));
        setcontext(&fiber.beginning);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(home_fake_, nullptr, nullptr);
#endif
}

// The fiber whose turn it is, home; comes back when it is its turn again.
__attribute__((noinline)) void Block::leave() {
    Fiber& fiber = fibers_[now_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.fake_stack, home_stack_, home_size_);
#endif
    if (_setjmp(fiber.place) == 0) _longjmp(home_, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibers_[now_].fake_stack, &home_stack_, &home_size_);
#endif
}

void Block::begin(unsigned high, unsigned low) {
    reinterpret_cast<Block*>(uintptr_t(uint64_t(high) << 32 | low))->live();
}

// A fiber's life: one thread after another, of block after block.
void Block::live() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &home_stack_, &home_size_);
#endif
    for (;;) {
        (*body_)();
        fibers_[now_].ended = true;
        leave();
    }
}

}  // namespace fastlora::host
