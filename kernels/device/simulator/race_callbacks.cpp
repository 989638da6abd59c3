// Kernels of the race build are compiled with -fsanitize=thread but linked without its library: the compiler's calls, one before every
// load and store, land here.
#ifdef LIGHTMOE_RACE

#include <cstring>

#include "kernels/device/simulator/internal.h"

extern "C" char __executable_start;

namespace lightmoe::simulator::race {
void access_at(Thread* thread, const void* p, size_t bytes, bool write, bool atomic, uint32_t place);
}

namespace {

void on_access(const volatile void* p, size_t bytes, bool write, bool atomic, void* return_address) {
  using namespace lightmoe::simulator;
  if (current_view == nullptr) return;  // host code in a kernel file
  const auto place = static_cast<uint32_t>(static_cast<char*>(return_address) - &__executable_start);
  race::access_at(current(), const_cast<const void*>(p), bytes, write, atomic, place);
}

}  // namespace

#define CALLER __builtin_return_address(0)
#define ON_ACCESS(bytes)                                                                             \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, false, false, CALLER); }                    \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, true, false, CALLER); }                    \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, false, false, CALLER); }          \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, true, false, CALLER); }          \
  void __tsan_volatile_read##bytes(void* p) { on_access(p, bytes, false, false, CALLER); }           \
  void __tsan_volatile_write##bytes(void* p) { on_access(p, bytes, true, false, CALLER); }           \
  void __tsan_unaligned_volatile_read##bytes(void* p) { on_access(p, bytes, false, false, CALLER); } \
  void __tsan_unaligned_volatile_write##bytes(void* p) { on_access(p, bytes, true, false, CALLER); } \
  void __tsan_read_write##bytes(void* p) {                                                           \
    on_access(p, bytes, false, false, CALLER);                                                       \
    on_access(p, bytes, true, false, CALLER);                                                        \
  }                                                                                                  \
  void __tsan_unaligned_read_write##bytes(void* p) {                                                 \
    on_access(p, bytes, false, false, CALLER);                                                       \
    on_access(p, bytes, true, false, CALLER);                                                        \
  }
#define ON_UPDATE(bits, T, name)                                      \
  T __tsan_atomic##bits##_fetch_##name(volatile T* p, T value, int) { \
    on_access(p, sizeof(T), true, true, CALLER);                      \
    return __atomic_fetch_##name(p, value, __ATOMIC_SEQ_CST);         \
  }
#define ON_COMPARE(bits, T, name)                                                                      \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile T* p, T* expected, T value, int, int) {   \
    on_access(p, sizeof(T), true, true, CALLER);                                                       \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
// Kernels use a load and compare-and-exchange (simt_host.h); host code in the same files uses the rest.
#define ON_ATOMIC(bits, T)                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                       \
    on_access(p, sizeof(T), false, true, CALLER);                                                \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                              \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                                \
    on_access(p, sizeof(T), true, true, CALLER);                                                 \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                              \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) {                                \
    on_access(p, sizeof(T), true, true, CALLER);                                                 \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                      \
  }                                                                                              \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T expected, T value, int, int) {   \
    on_access(p, sizeof(T), true, true, CALLER);                                                 \
    __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    return expected;                                                                             \
  }                                                                                              \
  ON_COMPARE(bits, T, strong)                                                                    \
  ON_COMPARE(bits, T, weak)                                                                      \
  ON_UPDATE(bits, T, add)                                                                        \
  ON_UPDATE(bits, T, sub)                                                                        \
  ON_UPDATE(bits, T, and)                                                                        \
  ON_UPDATE(bits, T, or)                                                                         \
  ON_UPDATE(bits, T, xor)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
ON_ACCESS(1)
ON_ACCESS(2)
ON_ACCESS(4)
ON_ACCESS(8)
ON_ACCESS(16)
ON_ATOMIC(8, uint8_t)
ON_ATOMIC(16, uint16_t)
ON_ATOMIC(32, uint32_t)
ON_ATOMIC(64, uint64_t)
void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, false, false, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, true, false, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false, false, CALLER);
  on_access(to, bytes, true, false, CALLER);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false, false, CALLER);
  on_access(to, bytes, true, false, CALLER);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  on_access(to, bytes, true, false, CALLER);
  return std::memset(to, value, bytes);
}
}

#endif
