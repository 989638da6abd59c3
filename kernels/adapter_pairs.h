#pragma once
// Helpers of the CPU versions of adapter_chain.h: pairs of a slot, and matrices read as factors.

#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "kernels/adapter_chain.h"

namespace lightmoe {

struct PairRange {
  int64_t begin, end;
};
struct PairPlace {
  int64_t visit, index, token;
  PairPlace(const DispatchPlan& plan, int64_t p)
      : visit(plan.pair_visit.data<int32_t>()[p]),
        index(plan.pair_index.data<int32_t>()[p]),
        token(plan.pair_token.data<int32_t>()[p]) {}
};

// f(position, its pairs), positions in order, without those of groups that are done. The pairs of one position are of different visits.
template <class F>
void for_each_adapter(const DispatchPlan& plan, const std::vector<uint8_t>& done, F&& f) {
  const int32_t* offsets = plan.slot_offsets.data<int32_t>();
  for (size_t g = 0; g + 1 < plan.group_positions.size(); ++g) {
    if (!done.empty() && done[g] != 0) continue;
    for (auto i = static_cast<size_t>(plan.group_positions[g]); i < static_cast<size_t>(plan.group_positions[g + 1]);
         ++i) {
      f(i, PairRange{offsets[i], offsets[i + 1]});
    }
  }
}
// rows = sums [V, columns] rounded, without those of groups that are done.
template <class T>
void store_visits(const DispatchPlan& plan, const std::vector<uint8_t>& done, const std::vector<compute_t<T>>& sums,
                  const Tensor& rows) {
  const int32_t* offsets = plan.group_offsets.data<int32_t>();
  const int64_t columns = rows.dim(1);
  for (size_t g = 0; g + 1 < plan.group_positions.size(); ++g) {
    if (!done.empty() && done[g] != 0) continue;
    for (int64_t i = offsets[g] * columns; i < offsets[g + 1] * columns; ++i) {
      store(rows.data<T>(), i, sums[static_cast<size_t>(i)]);
    }
  }
}

template <class T>
T* row_or_null(const Tensor& t, int64_t row) {
  return t.defined() ? t.data<T>() + row * t.dim(1) : nullptr;
}

// A matrix of any type whose elements are factors beside rows of T: rounded to T. Undefined: no rows, no columns.
template <class T>
struct FactorRows {
  using C = compute_t<T>;
  int64_t rows = 0, columns = 0;
  std::vector<C> values;
  explicit FactorRows(const Tensor& m) {
    if (!m.defined()) return;
    rows = m.dim(0), columns = m.dim(1);
    const Tensor rounded = m.dtype() == dtype_of<T> ? m : m.to(dtype_of<T>);
    for (int64_t i = 0; i < m.numel(); ++i) values.push_back(load(rounded.data<T>(), i));
  }
  C at(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * columns + j)]; }
  C dot_row(int64_t i, const T* x) const {
    C sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += at(i, j) * load(x, j);
    return sum;
  }
  C dot_rounded(int64_t i, const std::vector<C>& x) const {
    C sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += at(i, j) * C(T(x[static_cast<size_t>(j)]));
    return sum;
  }
};

// Shapes and types of the matrices of a plan's slots; returns the largest rank.
inline int64_t check_adapters(const char* name, const DispatchPlan& plan, const AdapterMatrices& m, int64_t width,
                              DType rows) {
  const size_t count = plan.slot_order.size();
  require(m.b_gate.size() == count && m.b_up.size() == count && m.a_down.size() == count,
          "{}: matrices of {} slots, expected {}", name, m.b_gate.size(), count);
  int64_t largest = 0;
  const Tensor* first = nullptr;
  for (size_t i = 0; i < count; ++i) {
    require(m.b_gate[i].defined() == m.b_up[i].defined() && m.b_gate[i].defined() == m.a_down[i].defined(),
            "{}: slot {} has some of its three matrices", name, i);
    if (!m.b_gate[i].defined()) continue;
    if (first == nullptr) first = &m.b_gate[i];
    const int64_t rank = m.rank(i);
    require(rank > 0 && rank <= kMaxAdapterRank, "{}: rank {}, at most {}", name, rank, kMaxAdapterRank);
    require_tensor(m.b_gate[i], name, "b_gate", {width, rank}, first->dtype());
    require_tensor(m.b_up[i], name, "b_up", {width, rank}, first->dtype());
    require_tensor(m.a_down[i], name, "a_down", {rank, width}, first->dtype());
    largest = std::max(largest, rank);
  }
  require(first == nullptr || (first->dtype() == DType::kF64) == (rows == DType::kF64), "{}: matrices {}, rows {}",
          name, name_of(first != nullptr ? first->dtype() : rows), name_of(rows));
  return largest;
}

}  // namespace lightmoe
