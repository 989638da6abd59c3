#include "compress/latent_plan.h"

#include <algorithm>

namespace lightmoe {

LayerShape latent_shape(int64_t slots, const LatentForm& form) {
  LayerShape shape;
  shape.latent_size = form.size, shape.projections = form.projections, shape.projection_rank = form.rank;
  shape.latent_down = form.down, shape.latent_mix = form.group == 0;
  for (int64_t s = 0; s < slots; ++s) {
    shape.slots.push_back({.kind = SlotKind::kLatent, .latent = static_cast<int32_t>(s)});
    shape.latent_projection.push_back(form.group == 0 ? -1 : static_cast<int32_t>(s / form.group));
  }
  return shape;
}

int64_t parameters_of(const MethodInput& input, const LatentForm& form) {
  const ModelSize size = model_size(input.config);
  return size.rest + size.layers * stored_parameters(latent_shape(size.slots, form), size);
}

int64_t allowed_parameters(const MethodInput& input) {
  const ReplacementCost cost{.size = model_size(input.config), .bases = 1, .rank = 0};
  return allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
}

bool nothing_to_remove(const MethodInput& input) {
  return allowed_parameters(input) >= model_size(input.config).total();
}

int64_t largest_fitting(const MethodInput& input, int64_t low, int64_t high,
                        const std::function<LatentForm(int64_t)>& form) {
  const int64_t allowed = allowed_parameters(input);
  int64_t best = low - 1;
  while (low <= high) {
    const int64_t middle = low + (high - low) / 2;
    if (parameters_of(input, form(middle)) <= allowed)
      best = middle, low = middle + 1;
    else
      high = middle - 1;
  }
  return best;
}

void check_fits(const MethodInput& input, const LatentForm& form, const char* method, const std::string& what) {
  const int64_t least = parameters_of(input, form), allowed = allowed_parameters(input),
                whole = model_size(input.config).total();
  check(
      allowed >= least, ErrorKind::kUsage,
      "{} is impossible for {}: {}, so at least {:.1f} M parameters remain ({:.1f} % removed, {:.3f} GiB), but at most "
      "{:.1f} M are allowed; ask for less",
      describe(input.options.budget), method, what, static_cast<double>(least) * 1e-6,
      100 * (1 - static_cast<double>(least) / static_cast<double>(whole)),
      static_cast<double>(least) * input.bytes_per_parameter * 0x1p-30, static_cast<double>(allowed) * 1e-6);
}

Tensor LatentSource::left(int64_t, ExpertMatrix) { fail(ErrorKind::kInternal, "latents: no left factors"); }
Tensor LatentSource::mix(int64_t) { fail(ErrorKind::kInternal, "latents: nothing is mixed"); }

Plan plan_latents(const MethodInput& input, const LatentForm& form, const MakeSource& make) {
  const int64_t slots = input.config.num_experts;
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    LayerPlan layer{.shape = latent_shape(slots, form)};
    const std::shared_ptr<LatentSource> source = make(l);
    for (const ExpertMatrix matrix : kExpertMatrices) {
      const bool factored = matrix != ExpertMatrix::kDown || form.down;
      for (int64_t p = 0; factored && p < form.projections; ++p) {
        plan.computed[projection_tensor_name(l, p, matrix)] = [=] { return source->projection(p, matrix); };
        if (form.rank > 0) plan.computed[left_tensor_name(l, p, matrix)] = [=] { return source->left(p, matrix); };
      }
      for (int64_t s = 0; s < slots; ++s) {
        plan.computed[latent_tensor_name(l, s, matrix)] = [=] {
          return factored ? source->factor(s, matrix) : source->down(s);
        };
      }
    }
    for (int64_t s = 0; s < slots; ++s) {
      layer.replaced.push_back(static_cast<int32_t>(s));
      if (form.group == 0) plan.computed[mix_tensor_name(l, s)] = [=] { return source->mix(s); };
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

}  // namespace lightmoe
