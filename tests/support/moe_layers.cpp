#include "tests/support/moe_layers.h"

#include <algorithm>
#include <cmath>

namespace lightmoe::testing {
namespace {

ParameterPtr random_parameter(const std::string& name, const Shape& shape, DType dtype, uint64_t seed) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  p->value = random_tensor(shape, dtype, seed, 0.4);
  return p;
}

using Matrix = std::vector<double>;

// c[m,n] += scale * a^T or a times b, the way the equation reads; sizes are tiny.
Matrix product(const Matrix& a, const Matrix& b, int64_t m, int64_t k, int64_t n) {
  Matrix c(static_cast<size_t>(m * n), 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t l = 0; l < k; ++l)
        c[static_cast<size_t>(i * n + j)] += a[static_cast<size_t>(i * k + l)] * b[static_cast<size_t>(l * n + j)];
    }
  }
  return c;
}
Matrix transposed(const Matrix& a, int64_t rows, int64_t columns) {
  Matrix t(a.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j)
      t[static_cast<size_t>(j * rows + i)] = a[static_cast<size_t>(i * columns + j)];
  }
  return t;
}
void add(Matrix* to, const Matrix& from, double scale = 1) {
  if (to->empty()) to->assign(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] += scale * from[i];
}

// One slot's matrices: gate over up [2F,D], down [D,F].
struct DenseSlot {
  Matrix gate_up, down, dgate_up, ddown;
};

double original_share(const MoeLayer& layer, size_t slot, const Expert** original) {
  if (layer.beta <= 0) return 0;
  for (const AnnealedSlot& annealed : layer.annealed) {
    if (static_cast<size_t>(annealed.slot) == slot) {
      *original = &annealed.original;
      return layer.beta;
    }
  }
  return 0;
}

struct Sizes {
  int64_t d, f;
};

void add_adapter(const Adapter& a, Sizes n, DenseSlot* slot) {
  const int64_t r = a.rank();
  const Matrix up_and_gate = to_doubles(a.a_gate_up->value);
  const Matrix a_gate(up_and_gate.begin(), up_and_gate.begin() + r * n.d),
      a_up(up_and_gate.begin() + r * n.d, up_and_gate.end());
  Matrix both = product(to_doubles(a.b_gate->value), a_gate, n.f, r, n.d);
  const Matrix up = product(to_doubles(a.b_up->value), a_up, n.f, r, n.d);
  both.insert(both.end(), up.begin(), up.end());
  add(&slot->gate_up, both);
  add(&slot->down, product(to_doubles(a.b_down->value), to_doubles(a.a_down->value), n.d, r, n.f));
}

// The halves of a projection: gate rows, then up rows.
std::pair<Matrix, Matrix> halves_of(const Tensor& both) {
  const Matrix all = to_doubles(both);
  const auto middle = all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2);
  return {Matrix(all.begin(), middle), Matrix(middle, all.end())};
}

void add_latent(const MoeLayer& layer, const Latent& latent, Sizes n, DenseSlot* slot) {
  const Tensor& projection = layer.projections[static_cast<size_t>(latent.projection)]->value;
  const int64_t m = projection.dim(0) / 2;
  const auto [b_gate, b_up] = halves_of(projection);
  Matrix both = product(to_doubles(latent.a_gate->value), b_gate, n.f, m, n.d);
  const Matrix up = product(to_doubles(latent.a_up->value), b_up, n.f, m, n.d);
  both.insert(both.end(), up.begin(), up.end());
  add(&slot->gate_up, both);
  add(&slot->down, to_doubles(latent.down->value));
}

DenseSlot densify(const MoeLayer& layer, size_t s, Sizes n) {
  DenseSlot slot{Matrix(static_cast<size_t>(2 * n.f * n.d), 0), Matrix(static_cast<size_t>(n.d * n.f), 0), {}, {}};
  const Expert* original = nullptr;
  const double beta = original_share(layer, s, &original);
  if (layer.slots[s].kind == SlotKind::kLatent)
    add_latent(layer, layer.latents[static_cast<size_t>(layer.slots[s].latent)], n, &slot);
  const Expert bank =
      layer.slots[s].kind == SlotKind::kLatent ? Expert{} : layer.experts[static_cast<size_t>(layer.slots[s].expert)];
  if (bank.gate_up != nullptr) {
    add(&slot.gate_up, to_doubles(bank.gate_up->value), 1 - beta);
    add(&slot.down, to_doubles(bank.down->value), 1 - beta);
  }
  if (original != nullptr) {
    add(&slot.gate_up, to_doubles(original->gate_up->value), beta);
    add(&slot.down, to_doubles(original->down->value), beta);
  }
  if (layer.slots[s].adapter >= 0) add_adapter(layer.adapters[static_cast<size_t>(layer.slots[s].adapter)], n, &slot);
  slot.dgate_up.assign(slot.gate_up.size(), 0);
  slot.ddown.assign(slot.down.size(), 0);
  return slot;
}

// Forward and backward of one (token, slot); returns f(x).
Matrix run_slot(DenseSlot* slot, Sizes n, const double* x, double gate, const double* dy, double* dx, double* dgate) {
  Matrix h(static_cast<size_t>(2 * n.f), 0), a(static_cast<size_t>(n.f)), out(static_cast<size_t>(n.d), 0);
  for (int64_t i = 0; i < 2 * n.f; ++i) {
    for (int64_t j = 0; j < n.d; ++j)
      h[static_cast<size_t>(i)] += slot->gate_up[static_cast<size_t>(i * n.d + j)] * x[j];
  }
  for (int64_t i = 0; i < n.f; ++i) {
    const double z = h[static_cast<size_t>(i)];
    a[static_cast<size_t>(i)] = z / (1 + std::exp(-z)) * h[static_cast<size_t>(n.f + i)];
  }
  *dgate = 0;
  for (int64_t i = 0; i < n.d; ++i) {
    for (int64_t j = 0; j < n.f; ++j)
      out[static_cast<size_t>(i)] += slot->down[static_cast<size_t>(i * n.f + j)] * a[static_cast<size_t>(j)];
    *dgate += dy[i] * out[static_cast<size_t>(i)];
  }
  for (int64_t j = 0; j < n.f; ++j) {
    double da = 0;
    for (int64_t i = 0; i < n.d; ++i) {
      da += gate * dy[i] * slot->down[static_cast<size_t>(i * n.f + j)];
      slot->ddown[static_cast<size_t>(i * n.f + j)] += gate * dy[i] * a[static_cast<size_t>(j)];
    }
    const double z = h[static_cast<size_t>(j)], sigma = 1 / (1 + std::exp(-z));
    const double dz[2] = {da * h[static_cast<size_t>(n.f + j)] * sigma * (1 + z * (1 - sigma)), da * z * sigma};
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = half * n.f + j;
      for (int64_t i = 0; i < n.d; ++i) {
        slot->dgate_up[static_cast<size_t>(row * n.d + i)] += dz[half] * x[i];
        dx[i] += dz[half] * slot->gate_up[static_cast<size_t>(row * n.d + i)];
      }
    }
  }
  return out;
}

// Units of what a slot computes.
int64_t width_of(const MoeLayer& layer, const Slot& slot) {
  if (slot.kind == SlotKind::kLatent) return layer.latents[static_cast<size_t>(slot.latent)].down->value.dim(1);
  if (slot.kind != SlotKind::kExpert) return 0;
  const Expert& expert = layer.experts[static_cast<size_t>(slot.expert)];
  if (expert.down != nullptr) return expert.down->value.dim(1);
  if (slot.adapter >= 0) return layer.adapters[static_cast<size_t>(slot.adapter)].b_gate->value.dim(0);
  return layer.annealed.empty() ? 0 : layer.annealed.front().original.down->value.dim(1);
}

}  // namespace

MoeLayer make_layer(const LayerSpec& spec, DType dtype, DType trained_dtype, uint64_t seed) {
  const int64_t d = spec.hidden, f = spec.width, slots = static_cast<int64_t>(spec.expert_of_slot.size());
  const auto contains = [](const std::vector<int32_t>& list, int32_t v) {
    return std::find(list.begin(), list.end(), v) != list.end();
  };
  MoeLayer layer;
  layer.router = random_parameter("router", {slots, d}, dtype, seed++);
  const auto width_of = [&spec](int32_t e) {
    return spec.width_of_expert.empty() ? spec.width : spec.width_of_expert[static_cast<size_t>(e)];
  };
  const auto named = [](const std::vector<int32_t>& list, size_t s) { return list.empty() ? -1 : list[s]; };
  const int32_t bank = *std::max_element(spec.expert_of_slot.begin(), spec.expert_of_slot.end()) + 1;
  for (int32_t e = 0; e < bank; ++e) {
    if (contains(spec.zero_experts, e)) {
      layer.experts.push_back({});
      continue;
    }
    const bool frozen = contains(spec.frozen_experts, e);
    const DType own = frozen ? dtype : trained_dtype;
    layer.experts.push_back({random_parameter(fmt::format("expert {} gate_up", e), {2 * width_of(e), d}, own, seed),
                             random_parameter(fmt::format("expert {} down", e), {d, width_of(e)}, own, seed + 1)});
    seed += 2;
    layer.experts.back().gate_up->trainable = layer.experts.back().down->trainable = !frozen;
  }
  for (size_t s = 0; s < spec.expert_of_slot.size(); ++s) {
    Slot slot{.kind = spec.expert_of_slot[s] < 0 ? SlotKind::kRemoved : SlotKind::kExpert,
              .expert = spec.expert_of_slot[s]};
    if (const int32_t c = named(spec.constant_of_slot, s); c >= 0) {
      slot = {.kind = SlotKind::kConstant, .constant = c};
    }
    if (const int32_t p = named(spec.projection_of_slot, s); p >= 0) {
      slot = {.kind = SlotKind::kLatent, .latent = static_cast<int32_t>(layer.latents.size())};
      const auto part = [&](const char* name, const Shape& shape) {
        return random_parameter(fmt::format("latent {} {}", slot.latent, name), shape, trained_dtype, seed++);
      };
      layer.latents.push_back(
          {part("a_gate", {f, spec.latent_size}), part("a_up", {f, spec.latent_size}), part("down", {d, f}), p});
    }
    const int64_t r = spec.rank_of_slot.empty() ? 0 : spec.rank_of_slot[s];
    if (r > 0) {
      slot.adapter = static_cast<int32_t>(layer.adapters.size());
      const auto part = [&](const char* name, const Shape& shape) {
        return random_parameter(fmt::format("adapter {} {}", slot.adapter, name), shape, trained_dtype, seed++);
      };
      const int64_t w = slot.kind == SlotKind::kExpert ? width_of(slot.expert) : f;
      layer.adapters.push_back({part("a_gate_up", {2 * r, d}), part("b_gate", {w, r}), part("b_up", {w, r}),
                                part("a_down", {r, w}), part("b_down", {d, r})});
    }
    layer.slots.push_back(slot);
  }
  if (!spec.constant_of_slot.empty()) {
    const int32_t rows = *std::max_element(spec.constant_of_slot.begin(), spec.constant_of_slot.end()) + 1;
    layer.constants = random_parameter("constants", {rows, d}, trained_dtype, seed++);
  }
  if (!spec.projection_of_slot.empty()) {
    const int32_t count = *std::max_element(spec.projection_of_slot.begin(), spec.projection_of_slot.end()) + 1;
    for (int32_t p = 0; p < count; ++p) {
      layer.projections.push_back(
          random_parameter(fmt::format("projection {}", p), {2 * spec.latent_size, d}, trained_dtype, seed++));
    }
  }
  for (const int32_t s : spec.annealed_slots) {
    layer.annealed.push_back({s,
                              {random_parameter("original", {2 * f, d}, dtype, seed),
                               random_parameter("original", {d, f}, dtype, seed + 1)}});
    seed += 2;
  }
  layer.beta = spec.beta;
  return layer;
}

DenseMoe::DenseMoe(const MoeLayer& layer, const Tensor& x_rows, const Tensor& slots, const Tensor& gate_values,
                   const Tensor& dy_rows) {
  const Matrix x = to_doubles(x_rows), gates = to_doubles(gate_values), dys = to_doubles(dy_rows);
  const int64_t tokens = x_rows.dim(0), top_k = slots.dim(1);
  const Matrix constants = layer.constants != nullptr ? to_doubles(layer.constants->value) : Matrix{};
  std::vector<Sizes> sizes;
  std::vector<DenseSlot> dense(layer.slots.size());
  for (size_t s = 0; s < dense.size(); ++s) {
    const SlotKind kind = layer.slots[s].kind;
    sizes.push_back({x_rows.dim(1), width_of(layer, layer.slots[s])});
    if (kind == SlotKind::kExpert || kind == SlotKind::kLatent) dense[s] = densify(layer, s, sizes[s]);
  }
  y.assign(x.size(), 0), dx.assign(x.size(), 0), dgates.assign(gates.size(), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      const auto pair = static_cast<size_t>(t * top_k + k);
      const auto index = static_cast<size_t>(slots.data<int32_t>()[pair]);
      const Slot& entry = layer.slots[index];
      const Sizes n = sizes[index];
      if (entry.kind == SlotKind::kConstant) {
        Matrix dc(constants.size(), 0);
        for (int64_t i = 0; i < n.d; ++i) {
          const auto at = static_cast<size_t>(entry.constant * n.d + i), row = static_cast<size_t>(t * n.d + i);
          y[row] += gates[pair] * constants[at];
          dgates[pair] += dys[row] * constants[at];
          dc[at] = gates[pair] * dys[row];
        }
        if (layer.constants->trainable) add(&gradients[layer.constants.get()], dc);
        continue;
      }
      DenseSlot* slot = &dense[index];
      const Matrix out = run_slot(slot, n, &x[static_cast<size_t>(t * n.d)], gates[pair],
                                  &dys[static_cast<size_t>(t * n.d)], &dx[static_cast<size_t>(t * n.d)], &dgates[pair]);
      for (int64_t i = 0; i < n.d; ++i)
        y[static_cast<size_t>(t * n.d + i)] += gates[pair] * out[static_cast<size_t>(i)];
    }
  }
  const auto put = [this](const ParameterPtr& p, const Matrix& gradient, double scale = 1) {
    if (p->trainable) add(&gradients[p.get()], gradient, scale);
  };
  for (size_t s = 0; s < dense.size(); ++s) {
    const bool is_latent = layer.slots[s].kind == SlotKind::kLatent;
    if (layer.slots[s].kind != SlotKind::kExpert && !is_latent) continue;
    const Expert* original = nullptr;
    const Sizes n = sizes[s];
    const double share = 1 - original_share(layer, s, &original);
    if (is_latent) {
      const Latent& latent = layer.latents[static_cast<size_t>(layer.slots[s].latent)];
      const ParameterPtr& projection = layer.projections[static_cast<size_t>(latent.projection)];
      const int64_t m = projection->value.dim(0) / 2, half = n.f * n.d;
      const Matrix dgate(dense[s].dgate_up.begin(), dense[s].dgate_up.begin() + half),
          dup(dense[s].dgate_up.begin() + half, dense[s].dgate_up.end());
      const auto [b_gate, b_up] = halves_of(projection->value);
      put(latent.a_gate, product(dgate, transposed(b_gate, m, n.d), n.f, n.d, m));
      put(latent.a_up, product(dup, transposed(b_up, m, n.d), n.f, n.d, m));
      put(latent.down, dense[s].ddown);
      Matrix db = product(transposed(to_doubles(latent.a_gate->value), n.f, m), dgate, m, n.f, n.d);
      const Matrix db_up = product(transposed(to_doubles(latent.a_up->value), n.f, m), dup, m, n.f, n.d);
      db.insert(db.end(), db_up.begin(), db_up.end());
      put(projection, db);
    }
    const Expert bank = is_latent ? Expert{} : layer.experts[static_cast<size_t>(layer.slots[s].expert)];
    if (bank.gate_up != nullptr) put(bank.gate_up, dense[s].dgate_up, share), put(bank.down, dense[s].ddown, share);
    if (layer.slots[s].adapter < 0) continue;
    const Adapter& a = layer.adapters[static_cast<size_t>(layer.slots[s].adapter)];
    const int64_t r = a.rank(), half = n.f * n.d;
    const Matrix dgate(dense[s].dgate_up.begin(), dense[s].dgate_up.begin() + half),
        dup(dense[s].dgate_up.begin() + half, dense[s].dgate_up.end());
    const Matrix a_both = to_doubles(a.a_gate_up->value);
    const Matrix a_gate(a_both.begin(), a_both.begin() + r * n.d), a_up(a_both.begin() + r * n.d, a_both.end());
    put(a.b_gate, product(dgate, transposed(a_gate, r, n.d), n.f, n.d, r));
    put(a.b_up, product(dup, transposed(a_up, r, n.d), n.f, n.d, r));
    Matrix da = product(transposed(to_doubles(a.b_gate->value), n.f, r), dgate, r, n.f, n.d);
    const Matrix da_up = product(transposed(to_doubles(a.b_up->value), n.f, r), dup, r, n.f, n.d);
    da.insert(da.end(), da_up.begin(), da_up.end());
    put(a.a_gate_up, da);
    put(a.b_down, product(dense[s].ddown, transposed(to_doubles(a.a_down->value), r, n.f), n.d, n.f, r));
    put(a.a_down, product(transposed(to_doubles(a.b_down->value), n.d, r), dense[s].ddown, r, n.d, n.f));
  }
}

Tensor random_slots(int64_t tokens, int64_t top_k, const std::vector<int32_t>& allowed, uint64_t seed) {
  Philox random(seed);
  std::vector<int32_t> slots;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int32_t> left = allowed;
    for (int64_t k = 0; k < top_k; ++k) {
      const auto pick = static_cast<int64_t>(random.below(left.size()));
      slots.push_back(left[static_cast<size_t>(pick)]);
      left.erase(left.begin() + pick);
    }
  }
  return Tensor::from(slots, {tokens, top_k});
}

}  // namespace lightmoe::testing
