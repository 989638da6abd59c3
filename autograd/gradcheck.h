#pragma once
// Gradients of a scalar against central differences, in double. For tests.

#include <functional>
#include <string>
#include <vector>

#include "autograd/tape.h"

namespace lightmoe {

struct GradCheckReport {
  double worst = 0;   // |analytic - numeric| over the tensor's largest |analytic| (at least 1e-3)
  std::string where;  // the tensor and element it belongs to
  int64_t checked = 0;
};

// loss records on the tape what it needs and returns the scalar; it must be a pure function of the f64 values of `inputs` (made by
// Tape::variable) and `parameters`, which are changed for a moment and restored. Parameter gradients are zeroed first.
// At most max_per_tensor elements of each tensor are checked, evenly spread.
GradCheckReport check_gradients(const std::function<double(Tape&)>& loss, const std::vector<Var>& inputs,
                                const std::vector<ParameterPtr>& parameters, int64_t max_per_tensor = 64);

}  // namespace lightmoe
