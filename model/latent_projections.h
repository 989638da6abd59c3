#pragma once
// The projections P [M,D] of one layer's latents (struct Latent in model/moe.h), by GROUP: rows of one group are multiplied with one P.
//   plain   a group is a projection that several latents share; P is what is stored
//   mixed   a group is a latent; P = silu(mix B), made in scratch a block of rows at a time for all latents with rows, so that neither
//           the mixes nor bases of low rank are ever whole in memory. Backward makes them again:
//             dB = mix^T dM,  dmix = dM B^T  with dM = dP * silu'(mix B);  of rank K also dleft = dB V^T, dV += left^T dB
// cost of a mixed layer in every pass, per matrix: 2 n_used n M D FLOPs to mix n projections for n_used latents, and 2 n (M-K) K D where
//   they are of rank K. Scratch: five blocks of at most kProjectionBlockBytes, of one row at least.

#include <functional>

#include "kernels/dispatch_plan.h"
#include "model/moe.h"
#include "model/moe_groups.h"

namespace lightmoe {

inline constexpr int64_t kProjectionBlockBytes = 64 << 20;

class LatentProjections {
 public:
  LatentProjections(const MoeLayer& layer, int64_t block_bytes = kProjectionBlockBytes);
  int64_t num_groups() const;
  int32_t group_of(int32_t latent) const;
  int64_t size() const { return size_; }  // M
  bool any_trainable(ExpertHalf half) const;

  // Rows [first, first + rows of p[g]) of every group's projections: gate over up (2M rows in all), or down (M rows).
  struct Block {
    int64_t first = 0;
    std::vector<Tensor> p;   // undefined for groups that no row asks for
    std::vector<Tensor> dp;  // with gradients: to be written with beta, undefined where nothing trains
    double beta = 0;
  };
  // All of them in ascending order, one block or several. plan: of rows by group.
  using Use = std::function<void(const Block&)>;
  void use(ExpertHalf half, const DispatchPlan& plan, DType activation, bool gradients, const Use& with) const;

 private:
  struct Part;
  void use_plain(ExpertHalf half, bool gradients, const Use& with) const;
  void use_block(const Part& part, DType dtype, bool gradients, const Use& with) const;
  Tensor basis_rows(const Part& part, DType dtype) const;
  Tensor mix_of(const Part& part, DType dtype) const;
  void add_basis_gradient(const Part& part, const Tensor& db) const;
  void add_mix_gradient(const Part& part, const Tensor& dmix) const;

  std::vector<Projection> projections_;
  std::vector<Latent> latents_;
  int64_t size_ = 0, hidden_ = 0, block_bytes_;
};

}  // namespace lightmoe
