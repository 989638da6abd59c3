// The fused ops between an MoE layer's gate/up and down products against their equations, token by token in double.

#include "kernels/adapter_chain.h"

#include <algorithm>

#include "tests/cases/adapter_chain.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using cases::AdapterChainCase;
using testing::close;
using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;
using Doubles = std::vector<double>;

DType accumulator_type(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// Distinct slots of every token.
Tensor choose(const AdapterChainCase& c) {
  Philox random(static_cast<uint64_t>(c.tokens + 7));
  std::vector<int32_t> chosen;
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::vector<int32_t> left(c.group_of_slot.size());
    for (size_t s = 0; s < left.size(); ++s) left[s] = static_cast<int32_t>(s);
    for (int64_t k = 0; k < c.top_k; ++k) {
      const auto pick = c.skewed ? 0 : static_cast<int64_t>(random.below(left.size()));
      chosen.push_back(left[static_cast<size_t>(pick)]);
      left.erase(left.begin() + pick);
    }
  }
  return Tensor::from(chosen, {c.tokens, c.top_k});
}

std::vector<int32_t> integers(const Tensor& t) {
  const Tensor host = t.on(DeviceKind::kCpu);
  return {host.data<int32_t>(), host.data<int32_t>() + host.numel()};
}

// A plan, the adapters of its slots, and where the oracle finds pair (t, k).
struct Setup {
  const AdapterChainCase& c;
  DType rows, weights;
  std::vector<int32_t> chosen, pair_of, visit_of;
  DispatchPlan plan;
  AdapterMatrices adapters;  // in plan.slot_order
  std::vector<size_t> position_of_slot;
  int64_t rank = 0;
  double tolerance;

  Setup(const AdapterChainCase& test, DType row_type, DType weight_type)
      : c(test), rows(row_type), weights(weight_type) {
    const Tensor slots = choose(c);
    const int32_t groups = *std::max_element(c.group_of_slot.begin(), c.group_of_slot.end()) + 1;
    plan = make_dispatch_plan(slots, c.group_of_slot, groups);
    chosen = integers(slots), pair_of = integers(plan.index_pair), visit_of = integers(plan.pair_visit);
    position_of_slot.resize(c.group_of_slot.size());
    for (size_t i = 0; i < plan.slot_order.size(); ++i) {
      const auto slot = static_cast<size_t>(plan.slot_order[i]);
      position_of_slot[slot] = i;
      const int64_t r = c.rank_of_slot[slot];
      rank = std::max(rank, r);
      const auto matrix = [&](const Shape& shape, uint64_t seed) {
        return r == 0 ? Tensor() : random_tensor(shape, weights, seed + 10 * i, 1 / std::sqrt(double(shape[1])));
      };
      adapters.b_gate.push_back(matrix({c.width, r}, 1));
      adapters.b_up.push_back(matrix({c.width, r}, 2));
      adapters.a_down.push_back(matrix({r, c.width}, 3));
    }
    // Products of at most `width` or `rank` terms, then sums over a token's slots or a slot's pairs; with bf16 the factors between
    // (a, dh) and the result are each rounded once more.
    tolerance = 3 * testing::sum_tolerance(rows, c.width + rank + c.top_k + c.tokens);
  }
  Tensor row_tensor(int64_t count, int64_t width, uint64_t seed) const {
    return random_tensor({count, width}, rows, seed);
  }
  // A factor as the op sees it.
  Doubles factor(const Tensor& m) const {
    return to_doubles(rows == DType::kBF16 && m.dtype() != rows ? m.to(DType::kBF16) : m);
  }
};

// Rows [count, width] that nobody owns on a device (behind the last pair) are left out of comparisons.
Doubles only(const Doubles& values, size_t width, const std::vector<int32_t>& owned) {
  Doubles kept;
  for (const int32_t row : owned) {
    kept.insert(kept.end(), values.begin() + static_cast<std::ptrdiff_t>(width * static_cast<size_t>(row)),
                values.begin() + static_cast<std::ptrdiff_t>(width * static_cast<size_t>(row + 1)));
  }
  return kept;
}
void expect_rows(const Tensor& actual, const Doubles& expected, const std::vector<int32_t>& owned, double tolerance,
                 const char* name) {
  const auto width = static_cast<size_t>(actual.dim(1));
  const Doubles kept = only(to_doubles(actual), width, owned);
  const DeviceScope host(DeviceKind::kCpu);
  EXPECT_TRUE(close(Tensor::from(kept, {static_cast<int64_t>(kept.size())}), only(expected, width, owned), tolerance))
      << name;
}

struct Inputs {
  Tensor h0, u, gates, ds, e;
  explicit Inputs(const Setup& s)
      : h0(s.row_tensor(s.plan.num_visits, 2 * s.c.width, 101)),
        u(s.row_tensor(s.plan.num_pairs, 2 * s.rank, 102)),
        gates(random_tensor({s.c.tokens, s.c.top_k}, accumulator_type(s.rows), 103, 0.5)),
        ds(s.row_tensor(s.plan.num_visits, s.c.width, 104)),
        e(s.row_tensor(s.plan.num_pairs, s.rank, 105)) {}
};

// Everything the ops compute, pair by pair.
struct Oracle {
  Doubles s, w, dh0, du, dgates;
  std::vector<Doubles> b_gate, b_up, a_down;  // gradients
  std::vector<int32_t> pairs, visits, adapted;

  Oracle(const Setup& setup, const Inputs& in) {
    const size_t f = static_cast<size_t>(setup.c.width), rank = static_cast<size_t>(setup.rank);
    h0_ = to_doubles(in.h0), u_ = to_doubles(in.u), gates_ = to_doubles(in.gates), ds_ = to_doubles(in.ds);
    e_ = to_doubles(in.e);
    const auto visits_count = static_cast<size_t>(setup.plan.num_visits),
               count = static_cast<size_t>(setup.plan.num_pairs);
    s.assign(visits_count * f, 0), dh0.assign(visits_count * 2 * f, 0);
    w.assign(count * rank, 0), du.assign(count * 2 * rank, 0), dgates.assign(gates_.size(), 0);
    for (const Tensor& m : setup.adapters.b_gate) {
      const size_t size = m.defined() ? static_cast<size_t>(m.numel()) : 0;
      b_gate.emplace_back(size, 0.0), b_up.emplace_back(size, 0.0), a_down.emplace_back(size, 0.0);
    }
    for (size_t at = 0; at < setup.chosen.size(); ++at) add_pair(setup, at);
    std::sort(visits.begin(), visits.end());
    visits.erase(std::unique(visits.begin(), visits.end()), visits.end());
  }

 private:
  void add_pair(const Setup& setup, size_t at) {
    if (setup.pair_of[at] < 0) return;
    const size_t f = static_cast<size_t>(setup.c.width), stride = static_cast<size_t>(setup.rank);
    const auto p = static_cast<size_t>(setup.pair_of[at]), v = static_cast<size_t>(setup.visit_of[p]);
    const size_t position = setup.position_of_slot[static_cast<size_t>(setup.chosen[at])];
    const auto r = static_cast<size_t>(setup.adapters.rank(position));
    pairs.push_back(static_cast<int32_t>(p)), visits.push_back(static_cast<int32_t>(v));
    if (r > 0) adapted.push_back(static_cast<int32_t>(p));
    Doubles bg, bu, ad;
    if (r > 0) {
      bg = setup.factor(setup.adapters.b_gate[position]), bu = setup.factor(setup.adapters.b_up[position]);
      ad = setup.factor(setup.adapters.a_down[position]);
    }
    const double g = gates_[at];
    for (size_t i = 0; i < f; ++i) {
      double gate = h0_[v * 2 * f + i], up = h0_[(v * 2 + 1) * f + i], c = ds_[v * f + i];
      for (size_t k = 0; k < r; ++k) {
        gate += bg[i * r + k] * u_[p * 2 * stride + k];
        up += bu[i * r + k] * u_[p * 2 * stride + r + k];
        c += ad[k * f + i] * e_[p * stride + k];
      }
      const double sigma = 1 / (1 + std::exp(-gate)), a = gate * sigma * up;
      s[v * f + i] += g * a;
      dgates[at] += c * a;
      const double dgate = g * c * up * sigma * (1 + gate * (1 - sigma)), dup = g * c * gate * sigma;
      dh0[v * 2 * f + i] += dgate, dh0[(v * 2 + 1) * f + i] += dup;
      for (size_t k = 0; k < r; ++k) {
        w[p * stride + k] += g * ad[k * f + i] * a;
        du[p * 2 * stride + k] += bg[i * r + k] * dgate, du[p * 2 * stride + r + k] += bu[i * r + k] * dup;
        b_gate[position][i * r + k] += dgate * u_[p * 2 * stride + k];
        b_up[position][i * r + k] += dup * u_[p * 2 * stride + r + k];
        a_down[position][k * f + i] += e_[p * stride + k] * g * a;
      }
    }
  }
  Doubles h0_, u_, gates_, ds_, e_;
};

void check_chain(const AdapterChainCase& c, DType rows, DType weights) {
  const Setup setup(c, rows, weights);
  const Inputs in(setup);
  const Oracle expected(setup, in);
  const Guarded s({setup.plan.num_visits, c.width}, rows);
  // Columns behind a slot's own rank stay as they are: zero here and in the oracle.
  const Tensor w = Tensor::zeros({setup.plan.num_pairs, setup.rank}, rows);
  run(AdapterChain{.plan = setup.plan,
                   .adapters = setup.adapters,
                   .h0 = in.h0,
                   .u = in.u,
                   .gates = in.gates,
                   .s = s.tensor(),
                   .w = w});
  expect_rows(s.tensor(), expected.s, expected.visits, setup.tolerance, "s");
  expect_rows(w, expected.w, expected.adapted, setup.tolerance, "w");
}

void check_backward(const AdapterChainCase& c, DType rows, DType weights, bool with_s) {
  const Setup setup(c, rows, weights);
  const Inputs in(setup);
  const Oracle expected(setup, in);
  const Guarded dh0(in.h0.shape(), rows), s({setup.plan.num_visits, c.width}, rows);
  const Tensor du = Tensor::zeros(in.u.shape(), rows), dgates = Tensor::zeros(in.gates.shape(), in.gates.dtype());
  run(AdapterChainBackward{.plan = setup.plan,
                           .adapters = setup.adapters,
                           .h0 = in.h0,
                           .u = in.u,
                           .gates = in.gates,
                           .ds = in.ds,
                           .e = in.e,
                           .dh0 = dh0.tensor(),
                           .du = du,
                           .dgates = dgates,
                           .s = with_s ? s.tensor() : Tensor()});
  expect_rows(dh0.tensor(), expected.dh0, expected.visits, setup.tolerance, "dh0");
  expect_rows(du, expected.du, expected.adapted, setup.tolerance, "du");
  EXPECT_TRUE(close(dgates, expected.dgates, setup.tolerance)) << "dgates";
  if (with_s) expect_rows(s.tensor(), expected.s, expected.visits, setup.tolerance, "s");
}

void check_gradients(const AdapterChainCase& c, DType rows, DType weights, const std::array<double, 3>& beta) {
  const Setup setup(c, rows, weights);
  const Inputs in(setup);
  const Oracle expected(setup, in);
  AdapterGradients op{.plan = setup.plan,
                      .adapters = setup.adapters,
                      .h0 = in.h0,
                      .u = in.u,
                      .gates = in.gates,
                      .ds = in.ds,
                      .e = in.e,
                      .gradients = {},
                      .beta = beta};
  std::vector<Tensor> before[3];
  const auto outputs = [&](const std::vector<Tensor>& values, std::vector<Tensor>* kept, uint64_t seed) {
    std::vector<Tensor> gradients;
    for (const Tensor& m : values) {
      const bool wanted = m.defined() && !(seed == 2 && gradients.size() == 1);  // one is not wanted
      gradients.push_back(wanted ? random_tensor(m.shape(), accumulator_type(rows), seed) : Tensor());
      kept->push_back(wanted ? gradients.back().clone() : Tensor());
    }
    return gradients;
  };
  op.gradients.b_gate = outputs(setup.adapters.b_gate, &before[0], 1);
  op.gradients.b_up = outputs(setup.adapters.b_up, &before[1], 2);
  op.gradients.a_down = outputs(setup.adapters.a_down, &before[2], 3);
  run(op);
  const std::vector<Tensor>* actual[3] = {&op.gradients.b_gate, &op.gradients.b_up, &op.gradients.a_down};
  const std::vector<Doubles>* sums[3] = {&expected.b_gate, &expected.b_up, &expected.a_down};
  for (size_t m = 0; m < 3; ++m) {
    for (size_t i = 0; i < before[m].size(); ++i) {
      if (!before[m][i].defined()) continue;
      Doubles sum = (*sums[m])[i];
      const Doubles old = to_doubles(before[m][i]);
      for (size_t n = 0; n < sum.size(); ++n) sum[n] += beta[m] * old[n];
      EXPECT_TRUE(close((*actual[m])[i], sum, setup.tolerance)) << "gradient " << m << " of position " << i;
    }
  }
}

void check_combine(const AdapterChainCase& c, DType rows, DType weights, DType y_type, unsigned bits) {
  const bool transposed = bits & 1, accumulate = bits & 2, with_rows = !(bits & 4);
  const Setup setup(c, rows, weights);
  const size_t d = static_cast<size_t>(c.hidden);
  std::vector<Tensor> matrices;
  int64_t depth = 0;  // twice the rank, as for dx
  for (size_t i = 0; i < setup.plan.slot_order.size(); ++i) {
    const int64_t k = 2 * setup.adapters.rank(i);
    depth = std::max(depth, k);
    matrices.push_back(k == 0 ? Tensor()
                              : random_tensor(transposed ? Shape{k, c.hidden} : Shape{c.hidden, k}, weights, 50 + i,
                                              1 / std::sqrt(double(k))));
  }
  const Tensor z = setup.row_tensor(setup.plan.num_pairs, depth, 7),
               visits = setup.row_tensor(setup.plan.num_visits, c.hidden, 8);
  const Guarded y({c.tokens, c.hidden}, y_type);
  Doubles expected(static_cast<size_t>(c.tokens) * d, 0);
  if (accumulate) {
    y.tensor().copy_from(random_tensor(y.tensor().shape(), y_type, 9));
    expected = to_doubles(y.tensor());
  }
  const Doubles zs = to_doubles(z), row_values = to_doubles(visits);
  std::vector<std::pair<size_t, size_t>> seen;  // (token, visit) added
  for (size_t at = 0; at < setup.chosen.size(); ++at) {
    if (setup.pair_of[at] < 0) continue;
    const size_t t = at / static_cast<size_t>(c.top_k), p = static_cast<size_t>(setup.pair_of[at]);
    const size_t position = setup.position_of_slot[static_cast<size_t>(setup.chosen[at])];
    const std::pair<size_t, size_t> visit{t, static_cast<size_t>(setup.visit_of[p])};
    const bool is_new = std::find(seen.begin(), seen.end(), visit) == seen.end();
    if (is_new) seen.push_back(visit);
    const Doubles m = matrices[position].defined() ? setup.factor(matrices[position]) : Doubles();
    const size_t k = m.size() / d;
    for (size_t i = 0; i < d; ++i) {
      double& sum = expected[t * d + i];
      if (is_new && with_rows) sum += row_values[visit.second * d + i];
      for (size_t n = 0; n < k; ++n)
        sum += m[transposed ? n * d + i : i * k + n] * zs[p * static_cast<size_t>(depth) + n];
    }
  }
  run(LowRankCombine{.plan = setup.plan,
                     .rows = with_rows ? visits : Tensor(),
                     .z = z,
                     .matrices = matrices,
                     .transposed = transposed,
                     .accumulate = accumulate,
                     .y = y.tensor()});
  EXPECT_TRUE(close(y.tensor(), expected, testing::sum_tolerance(y_type, c.top_k * (depth + 1) + 1)));
}

struct Types {
  DType rows, weights;
};
std::vector<Types> types() {
  std::vector<Types> list{{DType::kF32, DType::kF32},
                          {DType::kBF16, DType::kBF16},
                          {DType::kBF16, DType::kF32},
                          {DType::kF32, DType::kBF16}};
  if (default_device() == DeviceKind::kCpu) list.push_back({DType::kF64, DType::kF64});
  return list;
}

template <class F>
void for_each_case(F&& f) {
  size_t turn = 0;
  for (const AdapterChainCase& c : cases::adapter_chain) {
    // On the simulator two of the four combinations of types a case, in turn.
    const std::vector<Types> all = types();
    const size_t count = default_device() == DeviceKind::kCpu ? all.size() : 2;
    for (size_t i = 0; i < count; ++i, ++turn) {
      const Types& t = all[(turn / 2 % 2 * 2 + i) % all.size()];
      SCOPED_TRACE(::testing::Message() << c.tokens << " tokens x " << c.top_k << ", width " << c.width << ", "
                                        << name_of(t.rows) << " rows, " << name_of(t.weights) << " weights");
      f(c, t, turn);
    }
  }
}

TEST(AdapterChain, MatchesTheEquation) {
  testing::on_each_device<AdapterChain>(
      [] { for_each_case([](const auto& c, const Types& t, size_t) { check_chain(c, t.rows, t.weights); }); });
}
TEST(AdapterChain, BackwardMatchesTheEquation) {
  testing::on_each_device<AdapterChainBackward>([] {
    for_each_case(
        [](const auto& c, const Types& t, size_t turn) { check_backward(c, t.rows, t.weights, turn % 3 != 0); });
  });
}
TEST(AdapterChain, GradientsMatchTheEquation) {
  testing::on_each_device<AdapterGradients>([] {
    for_each_case([](const auto& c, const Types& t, size_t turn) {
      const double beta = turn % 2 == 0 ? 0 : 1;
      check_gradients(c, t.rows, t.weights, {beta, 1 - beta, beta});
    });
  });
}
TEST(AdapterChain, CombineMatchesTheEquation) {
  testing::on_each_device<LowRankCombine>([] {
    for_each_case([](const auto& c, const Types& t, size_t turn) {
      const DType y = t.rows == DType::kBF16 && turn % 3 != 0 ? DType::kF32 : t.rows;
      check_combine(c, t.rows, t.weights, y, static_cast<unsigned>(turn));
      check_combine(c, t.rows, t.weights, y, static_cast<unsigned>(turn * 3 + 1));
    });
  });
}

}  // namespace
}  // namespace lightmoe
