#pragma once
// What one pass over task data says about the experts: the file that `calibrate` writes and every method reads.
// Sums run in f64 in the order of the tokens, so that the file depends on the data and the model alone.
// g_i(x) is the gate of slot i where the router chose it, else 0 (no renormalisation beyond the model's own); f_i(x) its output.
// On disk: one safetensors file, tensors named as the members below with layers stacked ([L,E], [L], [L,E,D], [L,E,F], [L,N,E], [L,N,D]), all
// f64 but the sample; those that were not collected are absent; metadata: format, model (fingerprint), data (hash), tokens, version.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct LayerStatistics {
  std::vector<double> count;              // [E] tokens whose top K hold the slot
  std::vector<double> gate_mass;          // [E] sum g
  std::vector<double> output_norm;        // [E] sum ||f|| over routed tokens
  std::vector<double> gate_output_norm;   // [E] sum g ||f||
  std::vector<double> output_norm2;       // [E] sum ||f||^2
  std::vector<double> gate_output_norm2;  // [E] sum g ||f||^2
  std::vector<double> routed_output;      // [E*D] sum f over routed tokens
  std::vector<double> routed_output2;     // [E*D] sum f^2, element by element, over routed tokens; empty in old files
  std::vector<double> all_output;         // [E*D] sum f over all tokens, empty unless asked for
  std::vector<double> unit_gradient2;     // [E*F] compress/unit_gradients.h, empty unless asked for
  std::vector<double> taylor;             // [E] of the same pass, empty unless asked for
  double logit_norm = 0;                  // sum over tokens of ||router logits||_2
  std::vector<float> sample_logits;       // [N*E] router logits of the token sample
  std::vector<float> sample_inputs;       // [N*D] what the MoE block saw for the same tokens, empty unless asked for
};

struct Statistics {
  int64_t num_layers = 0, num_slots = 0, hidden = 0;  // L, E, D
  int64_t tokens = 0;
  std::string model, data, version;  // fingerprint of the model, hash of the tokens, tool version
  bool uniform = false;              // made up: no calibration was given
  std::vector<LayerStatistics> layers;
  // The token sample: whole sequences (or their beginnings) spread evenly over the pass.
  std::vector<int64_t> sample_token;     // [N] index of the token in the pass
  std::vector<int32_t> sample_sequence;  // [N] which sequence it belongs to, ascending
  std::vector<int32_t> sample_ids;       // [N] the token itself; empty in old files
  std::vector<int32_t> sample_labels;    // [N] the next token, -100 where the loss skips it; empty in old files

  int64_t sample_size() const { return static_cast<int64_t>(sample_sequence.size()); }
};

Statistics empty_statistics(int64_t num_layers, int64_t num_slots, int64_t hidden, bool all_outputs);
// Every slot equal, no sample: what methods get when no calibration was made.
Statistics uniform_statistics(int64_t num_layers, int64_t num_slots, int64_t hidden);

void save_statistics(const Statistics& statistics, const std::filesystem::path& file);
// Error(kInput): not a statistics file, wrong shapes; Error(kNumeric): non-finite or negative sums.
Statistics load_statistics(const std::filesystem::path& file);
// Sums add, samples follow each other. Error(kInput) when models or shapes differ.
Statistics merge_statistics(const std::vector<Statistics>& parts);
// Error(kInput) when the statistics are of another model or shape; `name` is the file.
void check_statistics(const Statistics& statistics, const std::string& model, int64_t num_layers, int64_t num_slots,
                      int64_t hidden, const std::string& name);

// Slots that no token reached, per layer, and a table that names them.
std::vector<std::vector<int32_t>> starved_slots(const Statistics& statistics);
std::string coverage_table(const Statistics& statistics);

// Mean over sequences of the cosine between two slots' router-logit columns (the rule of M-SMoE, arXiv 2310.01334), [E*E];
// empty without a sample.
std::vector<double> logit_similarity(const Statistics& statistics, int64_t layer);

}  // namespace lightmoe
