#pragma once
// The simulator's half of simt.h, which alone includes it.

#include <cmath>

#include "kernels/device/simulator/machine.h"
#include "runtime/device_graph.h"

#define LIGHTMOE_DEVICE sim
#define DEVICE_FN inline
#define SITE , ::lightmoe::simulator::Site site_ = {__builtin_FILE(), __builtin_LINE()}
#define HERE , site_
#define HERE_ONLY site_
#define LIGHTMOE_ONLY_SITE ::lightmoe::simulator::Site site_ = {__builtin_FILE(), __builtin_LINE()}

// CUDA's words, as a host compiler may read them.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define threadIdx (::lightmoe::simulator::current_view->index)
#define blockIdx (*::lightmoe::simulator::current_view->block_index)
#define blockDim (*::lightmoe::simulator::current_view->block_size)
#define gridDim (*::lightmoe::simulator::current_view->grid_size)

namespace lightmoe::sim {

inline constexpr DeviceKind kDevice = DeviceKind::kSim;
inline constexpr unsigned kFullWarp = 0xffffffffu;
using simulator::Dim3;
struct Launch {
  Dim3 blocks, threads;
  size_t shared_bytes = 0;
  const char* file = __builtin_FILE();  // where the launch stands, for errors
  int line = __builtin_LINE();
};

inline int multiprocessors() { return 4; }  // small, so that small tests meet what large products do
inline int compute_capability() { return 90; }

namespace detail {
template <class... Parameters>
std::tuple<std::decay_t<Parameters>...> parameters_of(void (*)(Parameters...));
}  // namespace detail

template <auto kKernel, class... Arguments>
void launch(const Launch& config, Arguments&&... arguments) {
  if (config.blocks.x == 0 || config.blocks.y == 0 || config.blocks.z == 0) return;
  using Parameters = decltype(detail::parameters_of(kKernel));
  Parameters parameters{static_cast<Arguments&&>(arguments)...};
  const char* name = __PRETTY_FUNCTION__;
  const simulator::Grid grid{config.blocks, config.threads, config.shared_bytes, {config.file, config.line}};
  constexpr auto entry = [](void* p) {
    std::apply([](const auto&... values) { kKernel(values...); }, *static_cast<Parameters*>(p));
  };
  if (is_recording(kDevice)) {
    return record_step([=]() mutable { simulator::launch(name, grid, entry, &parameters); });
  }
  simulator::launch(name, grid, entry, &parameters);
}

template <class T>
T& shared_memory(LIGHTMOE_ONLY_SITE) {
  return *static_cast<T*>(simulator::shared_memory(sizeof(T), site_));
}

inline void sync_block(LIGHTMOE_ONLY_SITE) { simulator::sync_block(simulator::BlockReduce::kNone, false, site_); }
inline int sync_block_count(bool predicate SITE) {
  return simulator::sync_block(simulator::BlockReduce::kCount, predicate, site_);
}
inline bool sync_block_and(bool predicate SITE) {
  return simulator::sync_block(simulator::BlockReduce::kAnd, predicate, site_) != 0;
}
inline bool sync_block_or(bool predicate SITE) {
  return simulator::sync_block(simulator::BlockReduce::kOr, predicate, site_) != 0;
}
inline void sync_warp(unsigned mask = kFullWarp SITE) { simulator::sync_warp(mask, site_); }

namespace detail {
template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T shuffled(simulator::Shuffle mode, T value, int source, int width, unsigned mask SITE) {
  const uint64_t bits = simulator::shuffle(mask, to_bits(value), source, width, mode, site_);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T reduced(simulator::WarpReduce of_unsigned, simulator::WarpReduce of_int, T value, unsigned mask SITE) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return static_cast<T>(
      simulator::reduce(mask, static_cast<uint32_t>(value), std::is_same_v<T, int> ? of_int : of_unsigned, site_));
}
}  // namespace detail

template <class T>
T shuffle(T value, int source, int width = 32, unsigned mask = kFullWarp SITE) {
  return detail::shuffled(simulator::Shuffle::kIndex, value, source, width, mask HERE);
}
template <class T>
T shuffle_up(T value, int distance, int width = 32, unsigned mask = kFullWarp SITE) {
  return detail::shuffled(simulator::Shuffle::kUp, value, distance, width, mask HERE);
}
template <class T>
T shuffle_down(T value, int distance, int width = 32, unsigned mask = kFullWarp SITE) {
  return detail::shuffled(simulator::Shuffle::kDown, value, distance, width, mask HERE);
}
template <class T>
T shuffle_xor(T value, int lane_mask, int width = 32, unsigned mask = kFullWarp SITE) {
  return detail::shuffled(simulator::Shuffle::kXor, value, lane_mask, width, mask HERE);
}
inline unsigned ballot(bool predicate, unsigned mask = kFullWarp SITE) {
  return simulator::ballot(mask, predicate, site_);
}
inline bool any(bool predicate, unsigned mask = kFullWarp SITE) {
  return simulator::ballot(mask, predicate, site_) != 0;
}
inline bool all(bool predicate, unsigned mask = kFullWarp SITE) {
  return simulator::ballot(mask, predicate, site_) == mask;
}
template <class T>
unsigned match_any(T value, unsigned mask = kFullWarp SITE) {
  return simulator::match_any(mask, detail::to_bits(value), site_);
}
template <class T>
T reduce_add(T value, unsigned mask = kFullWarp SITE) {
  return detail::reduced(simulator::WarpReduce::kAdd, simulator::WarpReduce::kAdd, value, mask HERE);
}
template <class T>
T reduce_min(T value, unsigned mask = kFullWarp SITE) {
  return detail::reduced(simulator::WarpReduce::kMinU, simulator::WarpReduce::kMinS, value, mask HERE);
}
template <class T>
T reduce_max(T value, unsigned mask = kFullWarp SITE) {
  return detail::reduced(simulator::WarpReduce::kMaxU, simulator::WarpReduce::kMaxS, value, mask HERE);
}
// __activemask has no counterpart on purpose: its value depends on how the hardware happens to have converged.

// Blocks may run on several OS threads, so these are real atomics.
namespace detail {
template <class T, class F>
T update(T* p, F&& f) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  Word* word = reinterpret_cast<Word*>(p);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T old, next;
  do {
    std::memcpy(&old, &before, sizeof(T));
    next = f(old);
    std::memcpy(&after, &next, sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace detail

template <class T>
T atomic_add(T* p, std::type_identity_t<T> value) {
  return detail::update(p, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomic_max(T* p, std::type_identity_t<T> value) {
  return detail::update(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomic_min(T* p, std::type_identity_t<T> value) {
  return detail::update(p, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomic_exchange(T* p, std::type_identity_t<T> value) {
  return detail::update(p, [&](T) { return value; });
}
template <class T>
T atomic_cas(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return detail::update(p, [&](T old) { return old == expected ? value : old; });
}
inline void thread_fence_block() {}
inline void thread_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void trap(LIGHTMOE_ONLY_SITE) { simulator::trap(site_); }

}  // namespace lightmoe::sim
