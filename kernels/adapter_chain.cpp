#include "kernels/adapter_chain.h"

#include <algorithm>

#include "kernels/access.h"
#include "kernels/adapter_pairs.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// One pair's h, SwiGLU and its derivatives at h.
template <class T>
struct PairChain {
  using C = compute_t<T>;
  int64_t width;
  std::vector<C> gate, up, a;
  explicit PairChain(int64_t f)
      : width(f), gate(static_cast<size_t>(f)), up(static_cast<size_t>(f)), a(static_cast<size_t>(f)) {}

  void forward(const T* h0, const T* u, const FactorRows<T>& b_gate, const FactorRows<T>& b_up) {
    for (int64_t f = 0; f < width; ++f) {
      const auto i = static_cast<size_t>(f);
      gate[i] = load(h0, f) + b_gate.dot_row(f, u);
      up[i] = load(h0, width + f) + b_up.dot_row(f, u + b_up.columns);
      a[i] = gate[i] * sigmoid(gate[i]) * up[i];
    }
  }
  // Of da at f: the gradients of gate and up.
  std::pair<C, C> backward(int64_t f, C da) const {
    const auto i = static_cast<size_t>(f);
    const C sigma = sigmoid(gate[i]), silu = gate[i] * sigma;
    return {da * up[i] * (sigma + silu * (1 - sigma)), da * silu};
  }
  static C sigmoid(C x) { return 1 / (1 + std::exp(-x)); }
};

template <class T>
void chain(const AdapterChain& op) {
  using C = compute_t<T>;
  const int64_t width = op.s.dim(1);
  std::vector<C> sums(static_cast<size_t>(op.s.numel()), 0);
  for_each_adapter(op.plan, op.done, [&](size_t position, const PairRange& pairs) {
    const FactorRows<T> b_gate(op.adapters.b_gate[position]), b_up(op.adapters.b_up[position]),
        a_down(op.adapters.a_down[position]);
    parallel_for(pairs.begin, pairs.end, 4, [&](int64_t begin, int64_t end) {
      PairChain<T> at(width);
      for (int64_t p = begin; p < end; ++p) {
        const PairPlace place(op.plan, p);
        at.forward(op.h0.data<T>() + place.visit * 2 * width, row_or_null<T>(op.u, p), b_gate, b_up);
        const C g = op.gates.data<C>()[place.index];
        for (int64_t f = 0; f < width; ++f) {
          sums[static_cast<size_t>(place.visit * width + f)] += g * at.a[static_cast<size_t>(f)];
        }
        for (int64_t r = 0; r < a_down.rows; ++r) store(row_or_null<T>(op.w, p), r, g * a_down.dot_rounded(r, at.a));
      }
    });
  });
  store_visits<T>(op.plan, op.done, sums, op.s);
}

// c[f] = ds[f] + (A_down^T e)[f]
template <class T>
std::vector<compute_t<T>> output_gradient(const T* ds, const T* e, const FactorRows<T>& a_down, int64_t width) {
  std::vector<compute_t<T>> c(static_cast<size_t>(width));
  for (int64_t f = 0; f < width; ++f) c[static_cast<size_t>(f)] = load(ds, f);
  for (int64_t r = 0; r < a_down.rows; ++r) {
    for (int64_t f = 0; f < width; ++f) c[static_cast<size_t>(f)] += load(e, r) * a_down.at(r, f);
  }
  return c;
}

template <class T>
void chain_backward(const AdapterChainBackward& op) {
  using C = compute_t<T>;
  const int64_t width = op.ds.dim(1);
  std::vector<C> sums(static_cast<size_t>(op.ds.numel()), 0), dh0(static_cast<size_t>(op.dh0.numel()), 0);
  for_each_adapter(op.plan, op.done, [&](size_t position, const PairRange& pairs) {
    const FactorRows<T> b_gate(op.adapters.b_gate[position]), b_up(op.adapters.b_up[position]),
        a_down(op.adapters.a_down[position]);
    parallel_for(pairs.begin, pairs.end, 4, [&](int64_t begin, int64_t end) {
      PairChain<T> at(width);
      for (int64_t p = begin; p < end; ++p) {
        const PairPlace place(op.plan, p);
        at.forward(op.h0.data<T>() + place.visit * 2 * width, row_or_null<T>(op.u, p), b_gate, b_up);
        const std::vector<C> c =
            output_gradient(op.ds.data<T>() + place.visit * width, row_or_null<T>(op.e, p), a_down, width);
        const C g = op.gates.data<C>()[place.index];
        C dot = 0;
        std::vector<C> du(static_cast<size_t>(2 * b_gate.columns), 0);
        for (int64_t f = 0; f < width; ++f) {
          const auto i = static_cast<size_t>(f);
          dot += c[i] * at.a[i];
          sums[static_cast<size_t>(place.visit * width) + i] += g * at.a[i];
          const auto [dgate, dup] = at.backward(f, g * c[i]);
          dh0[static_cast<size_t>(place.visit * 2 * width) + i] += dgate;
          dh0[static_cast<size_t>((place.visit * 2 + 1) * width) + i] += dup;
          for (int64_t r = 0; r < b_gate.columns; ++r) {
            du[static_cast<size_t>(r)] += C(T(dgate)) * b_gate.at(f, r);
            du[static_cast<size_t>(b_gate.columns + r)] += C(T(dup)) * b_up.at(f, r);
          }
        }
        op.dgates.data<C>()[place.index] = dot;
        for (size_t r = 0; r < du.size(); ++r) store(row_or_null<T>(op.du, p), static_cast<int64_t>(r), du[r]);
      }
    });
  });
  store_visits<T>(op.plan, op.done, dh0, op.dh0);
  if (op.s.defined()) store_visits<T>(op.plan, op.done, sums, op.s);
}

// Sums of one slot's three gradients.
template <class T>
struct SlotGradients {
  using C = compute_t<T>;
  std::vector<C> b_gate, b_up, a_down;  // [F,R] [F,R] [R,F]
  SlotGradients(int64_t width, int64_t rank) {
    b_gate.assign(static_cast<size_t>(width * rank), 0);
    b_up = a_down = b_gate;
  }
  static void write(const Tensor& gradient, double beta, const std::vector<C>& sum) {
    if (!gradient.defined()) return;
    for (size_t i = 0; i < sum.size(); ++i) {
      C& out = gradient.data<C>()[i];
      out = sum[i] + (beta == 0 ? C(0) : C(beta) * out);
    }
  }
};

template <class T>
void gradients(const AdapterGradients& op) {
  using C = compute_t<T>;
  const int64_t width = op.ds.dim(1);
  for_each_adapter(op.plan, {}, [&](size_t position, const PairRange& pairs) {
    const int64_t rank = op.adapters.rank(position);
    if (rank == 0) return;
    const FactorRows<T> b_gate(op.adapters.b_gate[position]), b_up(op.adapters.b_up[position]),
        a_down(op.adapters.a_down[position]);
    SlotGradients<T> sum(width, rank);
    PairChain<T> at(width);
    for (int64_t p = pairs.begin; p < pairs.end; ++p) {
      const PairPlace place(op.plan, p);
      const T *u = row_or_null<T>(op.u, p), *e = row_or_null<T>(op.e, p);
      at.forward(op.h0.data<T>() + place.visit * 2 * width, u, b_gate, b_up);
      const std::vector<C> c = output_gradient(op.ds.data<T>() + place.visit * width, e, a_down, width);
      const C g = op.gates.data<C>()[place.index];
      for (int64_t f = 0; f < width; ++f) {
        const auto [dgate, dup] = at.backward(f, g * c[static_cast<size_t>(f)]);
        for (int64_t r = 0; r < rank; ++r) {
          sum.b_gate[static_cast<size_t>(f * rank + r)] += C(T(dgate)) * load(u, r);
          sum.b_up[static_cast<size_t>(f * rank + r)] += C(T(dup)) * load(u, rank + r);
          sum.a_down[static_cast<size_t>(r * width + f)] += load(e, r) * C(T(g * at.a[static_cast<size_t>(f)]));
        }
      }
    }
    sum.write(op.gradients.b_gate[position], op.beta[0], sum.b_gate);
    sum.write(op.gradients.b_up[position], op.beta[1], sum.b_up);
    sum.write(op.gradients.a_down[position], op.beta[2], sum.a_down);
  });
}

void chain_cpu(const AdapterChain& op) {
  visit_floating("adapter_chain", op.h0.dtype(), [&]<class T>() { chain<T>(op); });
}
void chain_backward_cpu(const AdapterChainBackward& op) {
  visit_floating("adapter_chain_backward", op.h0.dtype(), [&]<class T>() { chain_backward<T>(op); });
}
void gradients_cpu(const AdapterGradients& op) {
  visit_floating("adapter_gradients", op.h0.dtype(), [&]<class T>() { gradients<T>(op); });
}
const RegisterKernel<AdapterChain> register_chain{DeviceKind::kCpu, &chain_cpu};
const RegisterKernel<AdapterChainBackward> register_backward{DeviceKind::kCpu, &chain_backward_cpu};
const RegisterKernel<AdapterGradients> register_gradients{DeviceKind::kCpu, &gradients_cpu};

// Shapes that all three share; returns the largest rank.
int64_t check_chain(const char* name, const DispatchPlan& plan, const AdapterMatrices& m, const Tensor& h0,
                    const Tensor& u, const Tensor& gates) {
  require(h0.rank() == 2 && h0.dim(1) % 2 == 0, "{}: h0 is {}, expected [V, 2F]", name, h0.shape());
  const int64_t width = h0.dim(1) / 2, rank = check_adapters(name, plan, m, width, h0.dtype());
  require_tensor(h0, name, "h0", {plan.num_visits, 2 * width}, h0.dtype());
  if (rank > 0) require_tensor(u, name, "u", {plan.num_pairs, 2 * rank}, h0.dtype());
  require_tensor(gates, name, "gates", plan.index_pair.shape(), accumulator_of(h0.dtype()));
  return rank;
}
void check_done(const char* name, const DispatchPlan& plan, const AdapterMatrices& adapters,
                const std::vector<uint8_t>& done) {
  require(done.empty() || done.size() + 1 == plan.group_positions.size(), "{}: {} groups are marked of {}", name,
          done.size(), plan.group_positions.size() - 1);
  for (size_t g = 0; g < done.size(); ++g) {
    for (auto i = static_cast<size_t>(plan.group_positions[g]); i < static_cast<size_t>(plan.group_positions[g + 1]);
         ++i) {
      require(done[g] == 0 || adapters.rank(i) == 0, "{}: group {} is done, and slot {} of it has an adapter", name, g,
              plan.slot_order[i]);
    }
  }
}

}  // namespace

void run(const AdapterChain& op) {
  const int64_t rank = check_chain("adapter_chain", op.plan, op.adapters, op.h0, op.u, op.gates);
  require_tensor(op.s, "adapter_chain", "s", {op.plan.num_visits, op.h0.dim(1) / 2}, op.h0.dtype());
  if (rank > 0) require_tensor(op.w, "adapter_chain", "w", {op.plan.num_pairs, rank}, op.h0.dtype());
  check_done("adapter_chain", op.plan, op.adapters, op.done);
  dispatch(op, op.h0.device(), "adapter_chain");
}

void run(const AdapterChainBackward& op) {
  constexpr const char* kName = "adapter_chain_backward";
  const int64_t rank = check_chain(kName, op.plan, op.adapters, op.h0, op.u, op.gates);
  const DType dtype = op.h0.dtype();
  require_tensor(op.ds, kName, "ds", {op.plan.num_visits, op.h0.dim(1) / 2}, dtype);
  require_tensor(op.dh0, kName, "dh0", op.h0.shape(), dtype);
  require_tensor(op.dgates, kName, "dgates", op.gates.shape(), op.gates.dtype());
  if (op.s.defined()) require_tensor(op.s, kName, "s", op.ds.shape(), dtype);
  if (rank > 0) {
    require_tensor(op.e, kName, "e", {op.plan.num_pairs, rank}, dtype);
    require_tensor(op.du, kName, "du", op.u.shape(), dtype);
  }
  check_done(kName, op.plan, op.adapters, op.done);
  dispatch(op, op.h0.device(), kName);
}

void run(const AdapterGradients& op) {
  constexpr const char* kName = "adapter_gradients";
  const int64_t rank = check_chain(kName, op.plan, op.adapters, op.h0, op.u, op.gates);
  if (rank == 0) return;
  require_tensor(op.ds, kName, "ds", {op.plan.num_visits, op.h0.dim(1) / 2}, op.h0.dtype());
  require_tensor(op.e, kName, "e", {op.plan.num_pairs, rank}, op.h0.dtype());
  const auto same_shapes = [&](const std::vector<Tensor>& gradient, const std::vector<Tensor>& value) {
    require(gradient.size() == value.size(), "{}: {} gradients of {} slots", kName, gradient.size(), value.size());
    for (size_t i = 0; i < value.size(); ++i) {
      if (gradient[i].defined())
        require_tensor(gradient[i], kName, "gradient", value[i].shape(), accumulator_of(op.h0.dtype()));
    }
  };
  same_shapes(op.gradients.b_gate, op.adapters.b_gate);
  same_shapes(op.gradients.b_up, op.adapters.b_up);
  same_shapes(op.gradients.a_down, op.adapters.a_down);
  dispatch(op, op.h0.device(), kName);
}

}  // namespace lightmoe
