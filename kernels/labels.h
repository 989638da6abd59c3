#pragma once
// Labels of the losses over the vocabulary: i32 [T], aligned with the rows of x, a token or kIgnoredLabel (Hugging Face's ignore_index).

#include <cstdint>

#include "runtime/tensor.h"

namespace lightmoe {

inline constexpr int32_t kIgnoredLabel = -100;

// Indices i32 [n] of the rows that have a label, ascending. cpu.
Tensor labelled_rows(const Tensor& labels);
// Error(kInternal) naming the op and the row where a label is neither ignored nor a token. Labels on a device are not read: the kernels
// that take them stop at such a one.
void check_labels(const Tensor& labels, int64_t vocabulary, const char* op);

}  // namespace lightmoe
