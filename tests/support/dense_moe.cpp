#include <algorithm>
#include <cmath>

#include "tests/support/moe_layers.h"

namespace lightmoe::testing {
namespace {

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

// One matrix (0 gate, 1 up, 2 down) of a projection: where its rows are, and how many are stored.
struct StoredRows {
  ParameterPtr values, left;  // left null: stored as it is
  size_t first = 0, left_first = 0;
  int64_t rows = 0, below = 0;
};
StoredRows stored_rows(const Projection& p, int64_t matrix, int64_t m) {
  StoredRows s{.values = matrix == 2 ? p.down : p.gate_up, .left = matrix == 2 ? p.left_down : p.left_gate_up};
  s.rows = s.left == nullptr ? m : s.left->value.dim(1), s.below = m - s.rows;
  if (matrix == 1) s.first = static_cast<size_t>(s.rows * s.values->value.dim(1));
  if (matrix == 1) s.left_first = static_cast<size_t>(s.below * s.rows);
  return s;
}
Matrix piece(const ParameterPtr& p, size_t first, int64_t count) {
  const Matrix all = to_doubles(p->value);
  const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first);
  return {begin, begin + count};
}

// B [M,D], written out.
Matrix basis_of(const Projection& p, int64_t matrix, int64_t m, int64_t d) {
  const StoredRows s = stored_rows(p, matrix, m);
  Matrix b = piece(s.values, s.first, s.rows * d);
  if (s.left == nullptr) return b;
  const Matrix below = product(piece(s.left, s.left_first, s.below * s.rows), b, s.below, s.rows, d);
  b.insert(b.end(), below.begin(), below.end());
  return b;
}

const ParameterPtr& factor_of(const Latent& latent, int64_t matrix) {
  return matrix == 0 ? latent.a_gate : matrix == 1 ? latent.a_up : latent.a_down;
}
double coefficient(const Latent& latent, int64_t matrix, size_t j) {
  const Matrix mix = to_doubles(latent.mix->value);
  return mix[static_cast<size_t>(matrix * latent.mix->value.dim(1)) + j];
}

// What silu is applied to, or P itself where nothing is mixed.
Matrix before_silu(const MoeLayer& layer, const Latent& latent, int64_t matrix, int64_t d) {
  const int64_t m = latent.a_gate->value.dim(1);
  if (latent.mix == nullptr) {
    return basis_of(layer.projections[static_cast<size_t>(latent.projection)], matrix, m, d);
  }
  Matrix sum;
  for (size_t j = 0; j < layer.projections.size(); ++j) {
    add(&sum, basis_of(layer.projections[j], matrix, m, d), coefficient(latent, matrix, j));
  }
  return sum;
}
Matrix projection_of(const MoeLayer& layer, const Latent& latent, int64_t matrix, int64_t d) {
  Matrix p = before_silu(layer, latent, matrix, d);
  if (latent.mix == nullptr) return p;
  for (double& v : p) v /= 1 + std::exp(-v);
  return p;
}

void add_latent(const MoeLayer& layer, const Latent& latent, Sizes n, DenseSlot* slot) {
  const int64_t m = latent.a_gate->value.dim(1);
  const auto made = [&](int64_t matrix) {
    const Matrix p = projection_of(layer, latent, matrix, n.d);
    return product(to_doubles(factor_of(latent, matrix)->value), p, n.f, m, n.d);
  };
  Matrix both = made(0);
  const Matrix up = made(1);
  both.insert(both.end(), up.begin(), up.end());
  add(&slot->gate_up, both);
  add(&slot->down, latent.down != nullptr ? to_doubles(latent.down->value) : transposed(made(2), n.f, n.d));
}

// An expert's matrix with zero units up to n.f: gate over up [rows,D], or down [D,rows].
Matrix with_units(const Matrix& w, int64_t rows, Sizes n, bool down) {
  const int64_t f = down ? rows : rows / 2;
  Matrix wide(static_cast<size_t>((down ? 1 : 2) * n.f * n.d), 0);
  for (size_t i = 0; i < w.size(); ++i) {
    const auto row = static_cast<int64_t>(i) / (down ? f : n.d), column = static_cast<int64_t>(i) % (down ? f : n.d);
    const int64_t to = down ? row * n.f + column : (row < f ? row : row - f + n.f) * n.d + column;
    wide[static_cast<size_t>(to)] = w[i];
  }
  return wide;
}
// The way back: what of such a matrix belongs to the expert's own units.
Matrix own_units(const Matrix& wide, int64_t f, Sizes n, bool down) {
  Matrix w;
  for (size_t i = 0; i < wide.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / (down ? n.f : n.d),
                  column = static_cast<int64_t>(i) % (down ? n.f : n.d);
    if ((down ? column : row % n.f) < f) w.push_back(wide[i]);
  }
  return w;
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
    add(&slot.gate_up, with_units(to_doubles(bank.gate_up->value), 2 * bank.down->value.dim(1), n, false), 1 - beta);
    add(&slot.down, with_units(to_doubles(bank.down->value), bank.down->value.dim(1), n, true), 1 - beta);
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
  if (slot.kind == SlotKind::kLatent) return layer.latents[static_cast<size_t>(slot.latent)].a_gate->value.dim(0);
  if (slot.kind != SlotKind::kExpert) return 0;
  const Expert& expert = layer.experts[static_cast<size_t>(slot.expert)];
  const int64_t stored = expert.down != nullptr ? expert.down->value.dim(1) : 0;
  if (slot.adapter >= 0)
    return std::max(stored, layer.adapters[static_cast<size_t>(slot.adapter)].b_gate->value.dim(0));
  if (stored > 0) return stored;
  return layer.annealed.empty() ? 0 : layer.annealed.front().original.down->value.dim(1);
}

}  // namespace

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
  const auto put_at = [this](const ParameterPtr& p, size_t first, const Matrix& gradient) {
    if (!p->trainable) return;
    Matrix& sum = gradients[p.get()];
    sum.resize(static_cast<size_t>(p->value.numel()), 0);
    for (size_t i = 0; i < gradient.size(); ++i) sum[first + i] += gradient[i];
  };
  // Of a projection's matrix, from that of B [M,D] as it is written out.
  const auto put_basis = [&](const Projection& projection, int64_t matrix, int64_t m, int64_t d, const Matrix& db) {
    const StoredRows s = stored_rows(projection, matrix, m);
    const auto middle = db.begin() + static_cast<std::ptrdiff_t>(s.rows * d);
    put_at(s.values, s.first, Matrix(db.begin(), middle));
    if (s.left == nullptr) return;
    const Matrix below(middle, db.end()), v = piece(s.values, s.first, s.rows * d);
    const Matrix left = piece(s.left, s.left_first, s.below * s.rows);
    put_at(s.left, s.left_first, product(below, transposed(v, s.rows, d), s.below, d, s.rows));
    put_at(s.values, s.first, product(transposed(left, s.below, s.rows), below, s.rows, s.below, d));
  };
  // dw [F,D] of W = A P.
  const auto put_latent = [&](const Latent& latent, int64_t matrix, Sizes n, const Matrix& dw) {
    const int64_t m = latent.a_gate->value.dim(1);
    const ParameterPtr& a = factor_of(latent, matrix);
    put(a, product(dw, transposed(projection_of(layer, latent, matrix, n.d), m, n.d), n.f, n.d, m));
    Matrix dp = product(transposed(to_doubles(a->value), n.f, m), dw, m, n.f, n.d);
    if (latent.mix == nullptr) {
      return put_basis(layer.projections[static_cast<size_t>(latent.projection)], matrix, m, n.d, dp);
    }
    const Matrix z = before_silu(layer, latent, matrix, n.d);
    for (size_t i = 0; i < dp.size(); ++i) {
      const double sigma = 1 / (1 + std::exp(-z[i]));
      dp[i] *= sigma * (1 + z[i] * (1 - sigma));
    }
    for (size_t j = 0; j < layer.projections.size(); ++j) {
      Matrix db;
      add(&db, dp, coefficient(latent, matrix, j));
      put_basis(layer.projections[j], matrix, m, n.d, db);
      const Matrix b = basis_of(layer.projections[j], matrix, m, n.d);
      double sum = 0;
      for (size_t i = 0; i < b.size(); ++i) sum += b[i] * dp[i];
      put_at(latent.mix, static_cast<size_t>(matrix * latent.mix->value.dim(1)) + j, {sum});
    }
  };
  for (size_t s = 0; s < dense.size(); ++s) {
    const bool is_latent = layer.slots[s].kind == SlotKind::kLatent;
    if (layer.slots[s].kind != SlotKind::kExpert && !is_latent) continue;
    const Expert* original = nullptr;
    const Sizes n = sizes[s];
    const double share = 1 - original_share(layer, s, &original);
    if (is_latent) {
      const Latent& latent = layer.latents[static_cast<size_t>(layer.slots[s].latent)];
      const auto middle = dense[s].dgate_up.begin() + static_cast<std::ptrdiff_t>(n.f * n.d);
      put_latent(latent, 0, n, Matrix(dense[s].dgate_up.begin(), middle));
      put_latent(latent, 1, n, Matrix(middle, dense[s].dgate_up.end()));
      if (latent.down != nullptr)
        put(latent.down, dense[s].ddown);
      else
        put_latent(latent, 2, n, transposed(dense[s].ddown, n.d, n.f));
    }
    const Expert bank = is_latent ? Expert{} : layer.experts[static_cast<size_t>(layer.slots[s].expert)];
    if (bank.gate_up != nullptr) {
      const int64_t f = bank.down->value.dim(1);
      put(bank.gate_up, own_units(dense[s].dgate_up, f, n, false), share);
      put(bank.down, own_units(dense[s].ddown, f, n, true), share);
    }
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

}  // namespace lightmoe::testing
