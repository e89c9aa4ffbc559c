#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(TERSOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace tersor {
namespace emulation {
namespace {

constexpr uint64_t canary = 0x7e4501f1be45afe5ull;

#if defined(TERSOR_ASAN)
const void* launcher_bottom = nullptr;  // the launching thread's own stack, learnt at the first switch
size_t launcher_size = 0;
#endif

}  // namespace

#if defined(__x86_64__)
// The registers that a call preserves go onto the stack, and the stack pointer is exchanged.
extern "C" void tersor_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden tersor_switch_stack
.globl tersor_switch_stack
.type tersor_switch_stack, @function
tersor_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tersor_switch_stack, . - tersor_switch_stack
)");

static void* first_frame(char* top, void (*entry)()) {
  uint64_t* frame = reinterpret_cast<uint64_t*>(top) - 10;  // six registers, entry; it starts 8 below a multiple of 16
  std::memset(frame, 0, 10 * sizeof *frame);
  frame[6] = reinterpret_cast<uint64_t>(entry);
  return frame;
}
#elif defined(__aarch64__)
extern "C" void tersor_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden tersor_switch_stack
.globl tersor_switch_stack
.type tersor_switch_stack, %function
tersor_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tersor_switch_stack, . - tersor_switch_stack
)");

static void* first_frame(char* top, void (*entry)()) {
  uint64_t* frame = reinterpret_cast<uint64_t*>(top) - 20;
  std::memset(frame, 0, 20 * sizeof *frame);
  frame[11] = reinterpret_cast<uint64_t>(entry);  // x30: where the switch returns to
  return frame;
}
#else
// Elsewhere the C library's contexts: correct, with a system call per switch.
static void tersor_switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

static void* first_frame(char* top, void (*entry)()) {
  ucontext_t* context = new (top - sizeof(ucontext_t) - 64) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = top - stack_bytes + 64;
  context->uc_stack.ss_size = stack_bytes - sizeof(ucontext_t) - 256;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
#if defined(TERSOR_ASAN)
  __asan_unpoison_memory_region(stack, stack_bytes);  // a fiber that was abandoned left its redzones
#endif
  std::memcpy(stack, &canary, sizeof canary);
  fiber.stack = stack;
  fiber.size = stack_bytes;
  fiber.fake_stack = nullptr;
  fiber.stack_pointer = first_frame(stack + stack_bytes, entry);
}

void switch_fiber(Fiber& from, Fiber& to, bool leaving) {
#if defined(TERSOR_ASAN)
  const void* bottom = to.stack ? to.stack : launcher_bottom;
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, bottom, to.stack ? to.size : launcher_size);
#endif
  (void)leaving;
  tersor_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(TERSOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber() {
#if defined(TERSOR_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!launcher_bottom) {  // the first fiber of all is entered from the launching thread
    launcher_bottom = bottom;
    launcher_size = size;
  }
#endif
}

bool overflowed(const Fiber& fiber) {
  return fiber.stack && std::memcmp(fiber.stack, &canary, sizeof canary) != 0;
}

char* stacks(size_t n) {
  static char* memory = nullptr;
  static size_t held = 0;
  if (n > held) {
    if (memory) munmap(memory, held * stack_bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, n * stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(p);
    held = n;
  }
  return memory;
}

}  // namespace emulation
}  // namespace tersor
