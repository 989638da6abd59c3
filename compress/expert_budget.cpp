#include "compress/expert_budget.h"

#include <algorithm>

namespace lightmoe {

int64_t experts_in_all(const MethodInput& input, int64_t least) {
  const ModelSize size = model_size(input.config);
  const ReplacementCost cost{.size = size, .bases = least, .rank = 0};  // everything but `least` experts may go
  const int64_t allowed = allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
  const int64_t minimum = size.rest + size.layers * least * size.expert;
  check(
      allowed >= minimum, ErrorKind::kUsage,
      "{} is impossible: {} experts per layer must stay, so {:.1f} M parameters remain ({:.1f} % removed, {:.3f} GiB), "
      "but at most {:.1f} M are allowed; ask for less",
      describe(input.options.budget), least, static_cast<double>(minimum) * 1e-6,
      100 * (1 - static_cast<double>(minimum) / static_cast<double>(size.total())),
      static_cast<double>(minimum) * input.bytes_per_parameter * 0x1p-30, static_cast<double>(allowed) * 1e-6);
  return std::min((allowed - size.rest) / size.expert, size.layers * size.slots);
}

int64_t experts_per_layer(const MethodInput& input, int64_t least) {
  return experts_in_all(input, least) / input.config.num_layers;
}

}  // namespace lightmoe
