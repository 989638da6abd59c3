#pragma once
// Threads over ranges. One pool for everything: OpenMP, which the BLAS shares.
// NOTE: a second pool (a pthread BLAS under OpenMP code) costs 3-5x on two cores.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

namespace lightmoe {

inline int num_threads() { return omp_get_max_threads(); }

// Calls f(begin, end) on disjoint contiguous pieces that cover [begin, end), at least `grain` long
// each. Which thread runs a piece never changes a result: f must write only what its range owns.
// The first exception thrown by a piece is rethrown here. Nested calls run serially.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t pieces = std::min<int64_t>(omp_in_parallel() ? 1 : num_threads(), (count + grain - 1) / grain);
  if (pieces <= 1) {
    f(begin, end);
    return;
  }
  std::exception_ptr error;
  std::mutex error_mutex;
#pragma omp parallel for num_threads(static_cast <int>(pieces)) schedule(static)
  for (int64_t p = 0; p < pieces; ++p) {
    try {
      f(begin + count * p / pieces, begin + count * (p + 1) / pieces);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// As parallel_for, for items of very different cost (ragged experts): f(i) for each i, handed out
// one at a time in order.
template <class F>
void parallel_items(int64_t count, F&& f) {
  if (count <= 0) return;
  if (count == 1 || omp_in_parallel() || num_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::exception_ptr error;
  std::mutex error_mutex;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      f(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace lightmoe
