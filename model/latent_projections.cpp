#include "model/latent_projections.h"

#include <algorithm>

#include "kernels/elementwise.h"
#include "kernels/gemm.h"

namespace lightmoe {
namespace {

bool trains(const ParameterPtr& p) { return p != nullptr && p->trainable; }

// A parameter's rows of one matrix: up stands below gate in what holds both.
Tensor rows_of(const Tensor& both, int64_t matrix, int64_t rows) {
  return matrix == 1 ? both.slice(rows, 2 * rows) : both.slice(0, rows);
}

void add(const Tensor& sum, const Tensor& x) { run(Axpy{.alpha = 1, .x = x, .y = sum}); }

}  // namespace

// Rows [first, first + rows) of one matrix (0 gate, 1 up, 2 down) of the mixes of some latents.
struct LatentProjections::Part {
  int64_t matrix = 0, first = 0, rows = 0;
  std::vector<size_t> latents;
  const ParameterPtr& values(const Projection& p) const { return matrix == 2 ? p.down : p.gate_up; }
  const ParameterPtr& left(const Projection& p) const { return matrix == 2 ? p.left_down : p.left_gate_up; }
};

LatentProjections::LatentProjections(const MoeLayer& layer, int64_t block_bytes)
    : projections_(layer.projections), latents_(layer.latents), block_bytes_(block_bytes) {
  if (latents_.empty()) return;
  size_ = latents_.front().a_gate->value.dim(1);
  const Projection& first = projections_.front();
  hidden_ = (first.gate_up != nullptr ? first.gate_up : first.down)->value.dim(1);
}

int64_t LatentProjections::num_groups() const {
  const bool mixed = !latents_.empty() && latents_.front().mix != nullptr;
  return static_cast<int64_t>(mixed ? latents_.size() : projections_.size());
}

int32_t LatentProjections::group_of(int32_t latent) const {
  const Latent& entry = latents_[static_cast<size_t>(latent)];
  return entry.mix != nullptr ? latent : entry.projection;
}

bool LatentProjections::any_trainable(ExpertHalf half) const {
  const bool down = half == ExpertHalf::kDown;
  return std::any_of(projections_.begin(), projections_.end(),
                     [down](const Projection& p) {
                       return trains(down ? p.down : p.gate_up) || trains(down ? p.left_down : p.left_gate_up);
                     }) ||
         std::any_of(latents_.begin(), latents_.end(), [](const Latent& l) { return trains(l.mix); });
}

void LatentProjections::use_plain(ExpertHalf half, bool gradients, const Use& with) const {
  Block block;
  std::vector<ParameterPtr> trained;
  for (const Projection& projection : projections_) {
    const ParameterPtr& p = half == ExpertHalf::kDown ? projection.down : projection.gate_up;
    block.p.push_back(p->value);
    if (gradients) trained.push_back(p->trainable ? p : nullptr);
  }
  block.beta = grad_beta_of(trained);
  for (const ParameterPtr& p : trained) block.dp.push_back(p != nullptr ? p->grad : Tensor());
  with(block);
}

// [n, rows * D]: those rows of every projection, one after the other.
Tensor LatentProjections::basis_rows(const Part& part, DType dtype) const {
  const Tensor all = Tensor::empty({static_cast<int64_t>(projections_.size()), part.rows * hidden_}, dtype);
  const int64_t end = part.first + part.rows;
  for (size_t j = 0; j < projections_.size(); ++j) {
    const Tensor to = all.row(static_cast<int64_t>(j)).reshape({part.rows, hidden_});
    const Tensor& stored = part.values(projections_[j])->value;
    const int64_t rank = part.left(projections_[j]) == nullptr ? size_ : part.left(projections_[j])->value.dim(1);
    const Tensor values = rows_of(stored, part.matrix, rank);
    const int64_t picked = std::clamp(rank - part.first, int64_t{0}, part.rows);  // rows that are stored
    if (picked > 0) to.slice(0, picked).copy_from(values.slice(part.first, part.first + picked));
    if (picked == part.rows) continue;
    const Tensor left = rows_of(part.left(projections_[j])->value, part.matrix, size_ - rank);
    run(Gemm{.a = left.slice(part.first + picked - rank, end - rank), .b = values, .c = to.slice(picked, part.rows)});
  }
  return all;
}

Tensor LatentProjections::mix_of(const Part& part, DType dtype) const {
  const auto n = static_cast<int64_t>(projections_.size());
  const Tensor mix = Tensor::empty({static_cast<int64_t>(part.latents.size()), n}, dtype);
  for (size_t i = 0; i < part.latents.size(); ++i) {
    mix.row(static_cast<int64_t>(i)).copy_from(latents_[part.latents[i]].mix->value.row(part.matrix));
  }
  return mix;
}

void LatentProjections::add_basis_gradient(const Part& part, const Tensor& db) const {
  for (size_t j = 0; j < projections_.size(); ++j) {
    const Tensor d = db.row(static_cast<int64_t>(j)).reshape({part.rows, hidden_});
    const ParameterPtr &values = part.values(projections_[j]), &left = part.left(projections_[j]);
    const int64_t rank = left == nullptr ? size_ : left->value.dim(1);
    const int64_t picked = std::clamp(rank - part.first, int64_t{0}, part.rows);
    const auto gradient = [&](const ParameterPtr& p, int64_t rows) {
      return rows_of(p->ensure_grad(), part.matrix, rows);
    };
    if (picked > 0 && values->trainable) {
      add(gradient(values, rank).slice(part.first, part.first + picked), d.slice(0, picked));
    }
    if (picked == part.rows) continue;
    const Tensor below = d.slice(picked, part.rows), v = rows_of(values->value, part.matrix, rank);
    const int64_t from = part.first + picked - rank, to = part.first + part.rows - rank;
    const Tensor u = rows_of(left->value, part.matrix, size_ - rank).slice(from, to);
    if (values->trainable) run(Gemm{.a = u, .b = below, .c = gradient(values, rank), .trans_a = true, .beta = 1});
    if (!left->trainable) continue;
    run(Gemm{.a = below, .b = v, .c = gradient(left, size_ - rank).slice(from, to), .trans_b = true, .beta = 1});
  }
}

void LatentProjections::add_mix_gradient(const Part& part, const Tensor& dmix) const {
  for (size_t i = 0; i < part.latents.size(); ++i) {
    const ParameterPtr& mix = latents_[part.latents[i]].mix;
    if (mix->trainable) add(mix->ensure_grad().row(part.matrix), dmix.row(static_cast<int64_t>(i)));
  }
}

void LatentProjections::use_block(const Part& part, DType dtype, bool gradients, const Use& with) const {
  const MemoryScope scope(MemoryCategory::kScratch);
  const auto used = static_cast<int64_t>(part.latents.size());
  const Tensor mix = mix_of(part, dtype), basis = basis_rows(part, dtype);
  const Shape shape{used, part.rows * hidden_};
  const Tensor sum = Tensor::empty(shape, dtype), p = Tensor::empty(shape, dtype),
               dp = gradients ? Tensor::empty(shape, dtype) : Tensor();
  run(Gemm{.a = mix, .b = basis, .c = sum});
  run(Silu{.x = sum, .y = p});
  Block block{.first = (part.matrix == 1 ? size_ : 0) + part.first, .p = {}, .dp = {}};
  block.p.resize(latents_.size()), block.dp.resize(gradients ? latents_.size() : 0);
  for (int64_t i = 0; i < used; ++i) {
    const size_t g = part.latents[static_cast<size_t>(i)];
    block.p[g] = p.row(i).reshape({part.rows, hidden_});
    if (gradients) block.dp[g] = dp.row(i).reshape({part.rows, hidden_});
  }
  with(block);
  if (!gradients) return;
  run(SiluBackward{.x = sum, .dy = dp, .dx = dp});
  const Tensor db = Tensor::empty(basis.shape(), dtype), dmix = Tensor::empty(mix.shape(), dtype);
  run(Gemm{.a = mix, .b = dp, .c = db, .trans_a = true});
  add_basis_gradient(part, db);
  run(Gemm{.a = dp, .b = basis, .c = dmix, .trans_b = true});
  add_mix_gradient(part, dmix);
}

void LatentProjections::use(ExpertHalf half, const DispatchPlan& plan, DType activation, bool gradients,
                            const Use& with) const {
  gradients = gradients && any_trainable(half);
  if (latents_.front().mix == nullptr) return use_plain(half, gradients, with);
  Part part;
  for (size_t g = 0; g < latents_.size(); ++g) {
    if (has_rows(plan, g)) part.latents.push_back(g);
  }
  if (part.latents.empty()) return;
  const auto rows = static_cast<int64_t>(std::max(part.latents.size(), projections_.size()));
  const int64_t most =
      std::clamp(block_bytes_ / (rows * hidden_ * static_cast<int64_t>(size_of(activation))), int64_t{1}, size_);
  const bool down = half == ExpertHalf::kDown;
  for (part.matrix = down ? 2 : 0; part.matrix < (down ? 3 : 2); ++part.matrix) {
    for (part.first = 0; part.first < size_; part.first += part.rows) {
      part.rows = std::min(most, size_ - part.first);
      use_block(part, activation, gradients, with);
    }
  }
}

}  // namespace lightmoe
