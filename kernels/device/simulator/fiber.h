#pragma once
// Stacks and the switch between them. x86-64: 14 instructions; elsewhere ucontext (about ten times slower).

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define LIGHTMOE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LIGHTMOE_ASAN 1
#endif
#endif

namespace lightmoe::simulator {

struct Fiber {
  void* context = nullptr;  // stack pointer, or ucontext_t
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // address sanitizer
};

// The fiber will run main() on its stack when first switched to. index spreads the stack tops.
void prepare(Fiber& fiber, int index, void (*main)());
void switch_fibers(Fiber& from, Fiber& to);
void arrived_on_fiber(Fiber& fiber);   // first words of a fiber's main
void adopt_this_thread(Fiber& fiber);  // the calling OS thread's own stack as a fiber

// Stack memory with a guard page below.
char* map_stack(size_t bytes);
void unmap_stack(char* stack, size_t bytes);

}  // namespace lightmoe::simulator
