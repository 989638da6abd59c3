#pragma once
// calibrate: one forward pass over task data, in which every MoE layer's router and experts are observed.
// Documents are taken in an order drawn from the seed until `tokens` are together (the last one is cut); each attends to itself
// only. Per slot the sums run in f64 in the order of the tokens: with the `native` products, whose rows do not depend on their
// neighbours, the result does not depend on batch_tokens or on the number of threads.
// cost: one forward pass and the chosen experts a second time; all_outputs: every expert on every token, E/K times the experts.

#include <functional>
#include <vector>

#include "compress/statistics.h"
#include "loaders/dataset.h"
#include "model/olmoe.h"

namespace lightmoe {

struct CalibrateOptions {
  int64_t tokens = int64_t{1} << 17;  // arXiv 2603.12645 uses 2^17
  int64_t length = 2048;              // longer documents are cut into pieces of this many tokens
  int64_t batch_tokens = 2048;        // tokens per forward pass
  int64_t sample_tokens = 4096;       // whose router logits are kept
  int64_t sample_length = 128;        // at most so many from one document
  bool all_outputs = false;           // mean outputs over all tokens as well
  bool sample_inputs = false;         // what the MoE blocks saw for the sampled tokens: 4 N L D bytes
  bool unit_gradients =
      false;  // compress/unit_gradients.h: a backward pass as well, gradients of all experts in memory
  uint64_t seed = 1;
  GemmCompute compute = GemmCompute::kF32;
};

// The sequences calibration sees, and which of their tokens are sampled: a pure function of documents and options.
struct CalibrationSet {
  std::vector<std::vector<int32_t>> sequences;
  std::vector<std::vector<int32_t>> labels;  // the token after each, -100 where the data's loss mask leaves it out
  std::vector<int64_t> sampled;              // per sequence: its first so many tokens
  int64_t tokens = 0;
  std::string hash;  // of the sequences and their labels
};
CalibrationSet calibration_set(const std::vector<Document>& documents, const CalibrateOptions& options);

// `fingerprint` is the model's (compress/weights.h). The model must be a stock one. Error(kNumeric) on non-finite activations.
Statistics calibrate(const Olmoe& model, const CalibrationSet& set, const std::string& fingerprint,
                     const CalibrateOptions& options,
                     const std::function<void(int64_t done, int64_t all)>& progress = {});

}  // namespace lightmoe
