#include "kernels/device/simulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "runtime/error.h"

#ifdef LIGHTMOE_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __x86_64__
// Saves the registers a callee must keep, and changes stacks.
extern "C" void lightmoe_switch_stack(void** from, void* to);
asm(R"(
.text
.globl lightmoe_switch_stack
.type lightmoe_switch_stack,@function
.p2align 4
lightmoe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lightmoe_switch_stack,.-lightmoe_switch_stack
)");
#endif

namespace lightmoe::simulator {
namespace {

constexpr size_t kGuardBytes = 4096;

void jump(Fiber& from, Fiber& to) {
#ifdef __x86_64__
  lightmoe_switch_stack(&from.context, to.context);
#else
  if (from.context == nullptr) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
}

}  // namespace

void prepare(Fiber& fiber, int index, void (*main)()) {
#ifdef __x86_64__
  // NOTE: stacks at a power-of-two pitch would all fall into the same cache sets (1.3-1.5 times slower), so their tops are staggered.
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + fiber.stack_bytes - static_cast<size_t>(index % 16) * 1088);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(main);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(uint64_t));
  fiber.context = top;
#else
  (void)index;
  if (fiber.context == nullptr) fiber.context = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = fiber.stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
#endif
  fiber.fake_stack = nullptr;
}

void switch_fibers(Fiber& from, Fiber& to) {
#ifdef LIGHTMOE_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  jump(from, to);
  arrived_on_fiber(from);
}

void arrived_on_fiber(Fiber& fiber) {
#ifdef LIGHTMOE_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  (void)fiber;
}

void adopt_this_thread(Fiber& fiber) {
#ifdef LIGHTMOE_ASAN
  // NOTE: pthread_getattr_np reads all of the process's memory map: once a thread, not once a block.
  static thread_local const std::pair<void*, size_t> stack = [] {
    pthread_attr_t attributes;
    std::pair<void*, size_t> found;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &found.first, &found.second);
    pthread_attr_destroy(&attributes);
    return found;
  }();
  fiber.stack = static_cast<char*>(stack.first), fiber.stack_bytes = stack.second;
#endif
  (void)fiber;
}

char* map_stack(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(memory != MAP_FAILED, ErrorKind::kMemory, "sim: no memory for the stack of a simulated thread ({} bytes)",
        bytes);
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

void unmap_stack(char* stack, size_t bytes) {
#ifdef LIGHTMOE_ASAN
  __asan_unpoison_memory_region(stack, bytes);  // poison outlives munmap and would hit whoever is mapped there next
#endif
  munmap(stack - kGuardBytes, bytes + kGuardBytes);
}

}  // namespace lightmoe::simulator
