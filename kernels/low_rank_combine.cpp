#include <algorithm>

#include "kernels/adapter_pairs.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

template <class T, class Y>
void combine(const LowRankCombine& op) {
  using C = compute_t<T>;
  const int64_t width = op.y.dim(1), terms = op.plan.token_visit.dim(1);
  const std::vector<int32_t>& order = op.plan.slot_order;
  std::vector<FactorRows<T>> factors;
  for (const Tensor& m : op.matrices) factors.emplace_back(m);
  const int32_t *visits = op.plan.token_visit.data<int32_t>(), *pairs = op.plan.index_pair.data<int32_t>(),
                *offsets = op.plan.slot_offsets.data<int32_t>();
  parallel_for(0, op.y.dim(0), 4, [&](int64_t begin, int64_t end) {
    std::vector<C> sum(static_cast<size_t>(width));
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < width; ++i) {
        sum[static_cast<size_t>(i)] = op.accumulate ? load(op.y.data<Y>(), t * width + i) : C(0);
      }
      for (int64_t j = t * terms; j < (t + 1) * terms && op.rows.defined(); ++j) {
        for (int64_t i = 0; visits[j] >= 0 && i < width; ++i) {
          sum[static_cast<size_t>(i)] += load(op.rows.data<T>(), visits[j] * width + i);
        }
      }
      std::vector<int32_t> own(pairs + t * terms, pairs + (t + 1) * terms);
      std::sort(own.begin(), own.end());  // by slot
      for (const int32_t p : own) {
        if (p < 0 || !op.z.defined()) continue;
        const auto position =
            static_cast<size_t>(std::upper_bound(offsets, offsets + order.size() + 1, p) - offsets) - 1;
        const FactorRows<T>& m = factors[position];
        const T* z = row_or_null<T>(op.z, p);
        if (op.transposed) {
          for (int64_t k = 0; k < m.rows; ++k) {
            for (int64_t i = 0; i < width; ++i) sum[static_cast<size_t>(i)] += load(z, k) * m.at(k, i);
          }
        } else {
          for (int64_t i = 0; i < m.rows; ++i) sum[static_cast<size_t>(i)] += m.dot_row(i, z);
        }
      }
      for (int64_t i = 0; i < width; ++i) store(op.y.data<Y>(), t * width + i, sum[static_cast<size_t>(i)]);
    }
  });
}

void combine_cpu(const LowRankCombine& op) {
  const DType rows = op.rows.defined() ? op.rows.dtype() : op.z.defined() ? op.z.dtype() : op.y.dtype();
  visit_floating("low_rank_combine", rows, [&]<class T>() {
    if (op.y.dtype() == dtype_of<T>) return combine<T, T>(op);
    if constexpr (std::is_same_v<T, bf16>) return combine<T, float>(op);
    unsupported_dtype("low_rank_combine", op.y.dtype());
  });
}
const RegisterKernel<LowRankCombine> register_combine{DeviceKind::kCpu, &combine_cpu};

}  // namespace

void run(const LowRankCombine& op) {
  constexpr const char* kName = "low_rank_combine";
  require(op.y.rank() == 2, "{}: y is {}, expected a matrix", kName, op.y.shape());
  const int64_t tokens = op.y.dim(0), width = op.y.dim(1);
  require(op.plan.token_visit.dim(0) == tokens, "{}: y has {} rows for {} tokens", kName, tokens,
          op.plan.token_visit.dim(0));
  if (op.rows.defined()) require_tensor(op.rows, kName, "rows", {op.plan.num_visits, width}, op.rows.dtype());
  if (op.z.defined()) {
    require(op.matrices.size() == op.plan.slot_order.size(), "{}: {} matrices of {} slots", kName, op.matrices.size(),
            op.plan.slot_order.size());
    require_tensor(op.z, kName, "z", {op.plan.num_pairs, op.z.dim(1)}, op.z.dtype());
    require(!op.rows.defined() || op.rows.dtype() == op.z.dtype(), "{}: rows {}, z {}", kName, name_of(op.rows.dtype()),
            name_of(op.z.dtype()));
    for (const Tensor& m : op.matrices) {
      if (!m.defined()) continue;
      const int64_t depth = m.dim(op.transposed ? 0 : 1);
      require(m.dim(op.transposed ? 1 : 0) == width && depth <= op.z.dim(1) && depth <= 2 * kMaxAdapterRank,
              "{}: a matrix of {} for {} columns of y and {} of z", kName, m.shape(), width, op.z.dim(1));
    }
  }
  dispatch(op, op.y.device(), kName);
}

}  // namespace lightmoe
