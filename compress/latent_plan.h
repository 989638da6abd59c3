#pragma once
// What the methods whose slots are latents share (struct Latent in model/moe.h): shapes, budget, plan. Every slot of every layer becomes a
// latent of its own; the methods differ in what is shared and in where the numbers come from.

#include <functional>

#include "compress/registry.h"

namespace lightmoe {

struct LatentForm {
  int64_t size = 0;         // M
  int64_t projections = 0;  // n
  int64_t group = 0;        // plain: slot s takes projection s / group; 0: mixed
  int64_t rank = 0;         // K of mixed projections
  bool down = false;        // down matrices are factors too
};
LayerShape latent_shape(int64_t slots, const LatentForm& form);
// Whole model, every layer in this form.
int64_t parameters_of(const MethodInput& input, const LatentForm& form);

// What the budget allows. Whether the model's own size is within it: then there is nothing to do.
int64_t allowed_parameters(const MethodInput& input);
bool nothing_to_remove(const MethodInput& input);
// The largest of [low, high] whose form fits the budget, low - 1 if none. The form must grow with its argument.
int64_t largest_fitting(const MethodInput& input, int64_t low, int64_t high,
                        const std::function<LatentForm(int64_t)>& form);
// Error(kUsage) unless the form fits the budget: the message says what it leaves, `what` in words ("down matrices stay whole").
void check_fits(const MethodInput& input, const LatentForm& form, const char* method, const std::string& what);

// Where the tensors of one layer come from, in the order they are written: projections, then latents. A source lives as long as the plan.
class LatentSource {
 public:
  virtual ~LatentSource() = default;
  virtual Tensor projection(int64_t projection, ExpertMatrix matrix) = 0;  // [M,D], of rank K [K,D]
  virtual Tensor left(int64_t projection, ExpertMatrix matrix);            // [M-K,K]
  virtual Tensor factor(int64_t latent, ExpertMatrix matrix) = 0;          // A [F,M]
  virtual Tensor down(int64_t latent) = 0;                                 // [D,F] where it is whole
  virtual Tensor mix(int64_t latent);                                      // [2,n] or [3,n]
};
using MakeSource = std::function<std::shared_ptr<LatentSource>(int64_t layer)>;
Plan plan_latents(const MethodInput& input, const LatentForm& form, const MakeSource& make);

}  // namespace lightmoe
