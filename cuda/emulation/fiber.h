// Fibers: one stack per CUDA thread and a switch of a few nanoseconds without a system call.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TERSOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TERSOR_ASAN 1
#endif
#endif

namespace tersor {
namespace emulation {

#if defined(TERSOR_ASAN)
constexpr size_t stack_bytes = 256 * 1024;  // redzones make frames several times larger
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif

struct Fiber {
  void* stack_pointer = nullptr;  // of the saved registers while it does not run
  char* stack = nullptr;          // lowest address; null for the thread that launches
  size_t size = 0;
  void* fake_stack = nullptr;     // AddressSanitizer's
};

// A fiber that, when first switched to, calls entry(), which must never return.
void prepare(Fiber& fiber, char* stack, void (*entry)());

// Saves the running fiber in `from` and continues `to`. leaving: `from` will never be continued.
void switch_fiber(Fiber& from, Fiber& to, bool leaving);

// To be called first by an entry function.
void enter_fiber();

// Whether a fiber ran past the low end of its stack (its last word is no longer what prepare wrote).
bool overflowed(const Fiber& fiber);

// Memory for the stacks of n fibers, kept for later launches; stack i starts at i * stack_bytes.
char* stacks(size_t n);

}  // namespace emulation
}  // namespace tersor
