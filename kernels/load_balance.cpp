#include <vector>

#include "kernels/access.h"
#include "kernels/router.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 1 << 16;

int64_t counted_tokens(const Tensor& mask, int64_t rows) {
  if (!mask.defined()) return rows;
  const uint8_t* values = mask.data<uint8_t>();
  return rows - std::count(values, values + rows, uint8_t{0});
}

// How often each slot was chosen, over all layers and counted tokens.
std::vector<int64_t> count_slots(const std::vector<Tensor>& slots, const uint8_t* mask, int64_t count) {
  std::vector<int64_t> chosen(static_cast<size_t>(count), 0);
  for (const Tensor& layer : slots) {
    const int32_t* values = layer.data<int32_t>();
    const int64_t top_k = layer.dim(1);
    for (int64_t i = 0; i < layer.numel(); ++i) {
      if (mask == nullptr || mask[i / top_k]) ++chosen[static_cast<size_t>(values[i])];
    }
  }
  return chosen;
}

// Sum of p over counted tokens, layer by layer in f64: one order whatever the threads.
template <class C>
std::vector<double> sum_probs(const std::vector<Tensor>& probs, const uint8_t* mask, int64_t count) {
  std::vector<double> by_layer(probs.size() * static_cast<size_t>(count), 0.0);
  const auto sum_layer = [&](int64_t layer) {
    const Tensor& p = probs[static_cast<size_t>(layer)];
    const C* values = p.data<C>();
    double* sum = by_layer.data() + layer * count;
    for (int64_t t = 0; t < p.dim(0); ++t) {
      if (mask != nullptr && !mask[t]) continue;
      for (int64_t e = 0; e < count; ++e) sum[e] += static_cast<double>(values[t * count + e]);
    }
  };
  parallel_for(0, static_cast<int64_t>(probs.size()), kGrainElements / (probs[0].numel() + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t layer = begin; layer < end; ++layer) sum_layer(layer);
               });
  std::vector<double> total(static_cast<size_t>(count), 0.0);
  for (size_t i = 0; i < by_layer.size(); ++i) total[i % static_cast<size_t>(count)] += by_layer[i];
  return total;
}

struct Pool {
  int64_t rows = 0, count = 0;  // T, E
  double tokens = 0;            // N
  const uint8_t* mask = nullptr;
};

template <class Op>
Pool pool_of(const Op& op) {
  Pool pool;
  if (op.probs.empty()) return pool;
  pool.rows = op.probs[0].dim(0);
  pool.count = op.probs[0].dim(1);
  pool.tokens = static_cast<double>(counted_tokens(op.mask, pool.rows)) * static_cast<double>(op.probs.size());
  if (op.mask.defined()) pool.mask = op.mask.template data<uint8_t>();
  return pool;
}

void forward_cpu(const LoadBalance& op) {
  const Pool pool = pool_of(op);
  double loss = 0;
  if (pool.tokens > 0) {
    const std::vector<int64_t> chosen = count_slots(op.slots, pool.mask, pool.count);
    const std::vector<double> sums = op.probs[0].dtype() == DType::kF64
                                         ? sum_probs<double>(op.probs, pool.mask, pool.count)
                                         : sum_probs<float>(op.probs, pool.mask, pool.count);
    for (size_t e = 0; e < sums.size(); ++e)
      loss += static_cast<double>(chosen[e]) / pool.tokens * (sums[e] / pool.tokens);
  }
  op.loss.data<double>()[0] = static_cast<double>(pool.count) * loss;
}

template <class C>
void write_gradient(const LoadBalanceBackward& op, const Pool& pool, const std::vector<C>& gradient) {
  parallel_for(0, pool.rows, kGrainElements / (pool.count + 1) + 1, [&](int64_t begin, int64_t end) {
    for (const Tensor& layer : op.dprobs) {
      if (!layer.defined()) continue;
      C* out = layer.data<C>();
      for (int64_t t = begin; t < end; ++t) {
        const bool counted = pool.mask == nullptr || pool.mask[t];
        for (int64_t e = 0; e < pool.count; ++e) {
          out[t * pool.count + e] = counted ? gradient[static_cast<size_t>(e)] : C(0);
        }
      }
    }
  });
}

void backward_cpu(const LoadBalanceBackward& op) {
  const Pool pool = pool_of(op);
  const std::vector<int64_t> chosen = count_slots(op.slots, pool.mask, pool.count);
  std::vector<double> gradient(chosen.size(), 0.0);
  for (size_t e = 0; e < chosen.size() && pool.tokens > 0; ++e) {
    const double fraction = static_cast<double>(chosen[e]) / pool.tokens;
    gradient[e] = op.scale * static_cast<double>(pool.count) * fraction / pool.tokens;
  }
  if (op.probs[0].dtype() == DType::kF64)
    write_gradient<double>(op, pool, gradient);
  else
    write_gradient<float>(op, pool, std::vector<float>(gradient.begin(), gradient.end()));
}

const RegisterKernel<LoadBalance> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<LoadBalanceBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

template <class Op>
void check_layers(const Op& op, const char* name) {
  require(!op.probs.empty() && op.probs.size() == op.slots.size(), "{}: {} layers of probs, {} of slots", name,
          op.probs.size(), op.slots.size());
  const Tensor& first = op.probs[0];
  require(first.rank() == 2, "{}: probs is {}, expected [T, E]", name, first.shape());
  require(first.dtype() == DType::kF32 || first.dtype() == DType::kF64, "{}: probs is {}, expected f32 or f64", name,
          name_of(first.dtype()));
  for (size_t layer = 0; layer < op.probs.size(); ++layer) {
    require_tensor(op.probs[layer], name, "probs", first.shape(), first.dtype());
    require(op.slots[layer].rank() == 2, "{}: slots is {}, expected [T, K]", name, op.slots[layer].shape());
    require_tensor(op.slots[layer], name, "slots", {first.dim(0), op.slots[layer].dim(1)}, DType::kI32);
  }
  if (op.mask.defined()) require_tensor(op.mask, name, "mask", {first.dim(0)}, DType::kU8);
}

}  // namespace

void run(const LoadBalance& op) {
  check_layers(op, "load_balance");
  require_tensor(op.loss, "load_balance", "loss", {1}, DType::kF64);
  dispatch(op, op.probs[0].device(), "load_balance");
}

void run(const LoadBalanceBackward& op) {
  check_layers(op, "load_balance_backward");
  require(op.dprobs.size() == op.probs.size(), "load_balance_backward: {} layers of dprobs, {} of probs",
          op.dprobs.size(), op.probs.size());
  for (const Tensor& layer : op.dprobs) {
    if (layer.defined())
      require_tensor(layer, "load_balance_backward", "dprobs", op.probs[0].shape(), op.probs[0].dtype());
  }
  dispatch(op, op.probs[0].device(), "load_balance_backward");
}

}  // namespace lightmoe
