#pragma once
// How fast a loaded model is here: a few repetitions of a small fixed piece of work, the best counts. For a comparison side by side
// within one report; bench/ measures with care.

#include "model/olmoe.h"

namespace lightmoe {

struct Speed {
  double prefill_tokens_per_second = 0;  // 512 tokens in sequences of 64
  double decode_tokens_per_second = 0;   // 32 tokens one by one
};
Speed measure_speed(const Olmoe& model);

}  // namespace lightmoe
