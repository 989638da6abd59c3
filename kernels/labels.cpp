#include "kernels/labels.h"

#include <vector>

#include "runtime/dispatch.h"

namespace lightmoe {

Tensor labelled_rows(const Tensor& labels) {
  std::vector<int32_t> rows;
  for (int64_t t = 0; t < labels.numel(); ++t) {
    if (labels.data<int32_t>()[t] != kIgnoredLabel) rows.push_back(static_cast<int32_t>(t));
  }
  return Tensor::from(rows, {static_cast<int64_t>(rows.size())});
}

void check_labels(const Tensor& labels, int64_t vocabulary, const char* op) {
  if (labels.device() != DeviceKind::kCpu) return;
  for (int64_t t = 0; t < labels.numel(); ++t) {
    const int32_t label = labels.data<int32_t>()[t];
    require(label == kIgnoredLabel || (label >= 0 && label < vocabulary),
            "{}: label {} at row {}, expected {} or one of {} tokens", op, label, t, kIgnoredLabel, vocabulary);
  }
}

}  // namespace lightmoe
