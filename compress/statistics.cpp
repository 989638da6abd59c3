#include "compress/statistics.h"

#include <algorithm>
#include <cmath>

#include "compress/text.h"
#include "runtime/version.h"

namespace lightmoe {

Statistics empty_statistics(int64_t num_layers, int64_t num_slots, int64_t hidden, bool all_outputs) {
  Statistics s{.num_layers = num_layers, .num_slots = num_slots, .hidden = hidden, .version = version()};
  const auto slots = static_cast<size_t>(num_slots), wide = static_cast<size_t>(num_slots * hidden);
  s.layers.resize(static_cast<size_t>(num_layers));
  for (LayerStatistics& l : s.layers) {
    for (auto* sums :
         {&l.count, &l.gate_mass, &l.output_norm, &l.gate_output_norm, &l.output_norm2, &l.gate_output_norm2}) {
      sums->assign(slots, 0.0);
    }
    l.routed_output.assign(wide, 0.0);
    l.routed_output2.assign(wide, 0.0);
    if (all_outputs) l.all_output.assign(wide, 0.0);
  }
  return s;
}

Statistics uniform_statistics(int64_t num_layers, int64_t num_slots, int64_t hidden) {
  Statistics s = empty_statistics(num_layers, num_slots, hidden, false);
  s.uniform = true;
  s.tokens = num_slots;
  for (LayerStatistics& layer : s.layers) {
    layer.count.assign(static_cast<size_t>(num_slots), 1);
    layer.gate_mass.assign(static_cast<size_t>(num_slots), 1);
    layer.logit_norm = static_cast<double>(num_slots);
  }
  return s;
}

namespace {

void add(std::vector<double>& sums, const std::vector<double>& more) {
  if (more.size() != sums.size()) sums.clear();  // means over all tokens: only when every part has them
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += more[i];
}

void add(LayerStatistics& to, const LayerStatistics& from) {
  add(to.count, from.count);
  add(to.gate_mass, from.gate_mass);
  add(to.output_norm, from.output_norm);
  add(to.gate_output_norm, from.gate_output_norm);
  add(to.output_norm2, from.output_norm2);
  add(to.gate_output_norm2, from.gate_output_norm2);
  add(to.routed_output, from.routed_output);
  add(to.routed_output2, from.routed_output2);
  add(to.all_output, from.all_output);
  add(to.unit_gradient2, from.unit_gradient2);
  add(to.taylor, from.taylor);
  to.logit_norm += from.logit_norm;
  const bool inputs = (from.sample_inputs.empty() == from.sample_logits.empty()) &&
                      (to.sample_inputs.empty() == to.sample_logits.empty());  // both parts have them
  if (!inputs) to.sample_inputs.clear();
  if (inputs) to.sample_inputs.insert(to.sample_inputs.end(), from.sample_inputs.begin(), from.sample_inputs.end());
  to.sample_logits.insert(to.sample_logits.end(), from.sample_logits.begin(), from.sample_logits.end());
}

}  // namespace

Statistics merge_statistics(const std::vector<Statistics>& parts) {
  require(!parts.empty(), "merge_statistics: nothing to merge");
  Statistics out = parts.front();
  for (size_t p = 1; p < parts.size(); ++p) {
    const Statistics& s = parts[p];
    check_statistics(s, out.model, out.num_layers, out.num_slots, out.hidden, fmt::format("statistics file {}", p + 1));
    for (const auto values : {&Statistics::sample_ids, &Statistics::sample_labels}) {  // only when every part has them
      if ((s.*values).size() != s.sample_token.size()) (out.*values).clear();
      if ((out.*values).size() == out.sample_token.size()) {
        (out.*values).insert((out.*values).end(), (s.*values).begin(), (s.*values).end());
      }
    }
    const int32_t next_sequence = out.sample_sequence.empty() ? 0 : out.sample_sequence.back() + 1;
    for (const int64_t token : s.sample_token) out.sample_token.push_back(out.tokens + token);
    for (const int32_t sequence : s.sample_sequence) out.sample_sequence.push_back(next_sequence + sequence);
    out.tokens += s.tokens;
    out.data += "+" + s.data;
    for (size_t l = 0; l < out.layers.size(); ++l) add(out.layers[l], s.layers[l]);
  }
  return out;
}

void check_statistics(const Statistics& s, const std::string& model, int64_t num_layers, int64_t num_slots,
                      int64_t hidden, const std::string& name) {
  check(s.num_layers == num_layers && s.num_slots == num_slots && s.hidden == hidden, ErrorKind::kInput,
        "{}: made for {} layers, {} experts, hidden {}; the model has {}, {}, {}", name, s.num_layers, s.num_slots,
        s.hidden, num_layers, num_slots, hidden);
  check(s.uniform || s.model == model, ErrorKind::kInput,
        "{}: made on another model (fingerprint {}, this model has {}); run `lightmoe calibrate` on this one", name,
        s.model, model);
}

std::vector<std::vector<int32_t>> starved_slots(const Statistics& s) {
  std::vector<std::vector<int32_t>> starved;
  for (const LayerStatistics& layer : s.layers) {
    auto& slots = starved.emplace_back();
    for (int64_t e = 0; e < s.num_slots; ++e) {
      if (layer.count[static_cast<size_t>(e)] == 0) slots.push_back(static_cast<int32_t>(e));
    }
  }
  return starved;
}

std::string coverage_table(const Statistics& s) {
  std::string table = fmt::format("{} tokens, {} layers of {} experts\n", s.tokens, s.num_layers, s.num_slots);
  table += "layer   used   tokens per expert: least  median    most   experts without tokens\n";
  const auto starved = starved_slots(s);
  for (size_t l = 0; l < s.layers.size(); ++l) {
    std::vector<double> counts = s.layers[l].count;
    std::sort(counts.begin(), counts.end());
    const std::string names = starved[l].empty() ? "none" : joined(starved[l]);
    table += fmt::format("{:5} {:6} {:25.0f} {:7.0f} {:7.0f}   {}\n", l, counts.size() - starved[l].size(),
                         counts.front(), counts[counts.size() / 2], counts.back(), names);
  }
  return table;
}

namespace {

// Adds the cosines of one sequence's columns; rows of `logits` are its tokens.
void add_cosines(const float* logits, size_t tokens, size_t slots, std::vector<double>& similarity) {
  std::vector<double> products(slots * slots, 0.0);
  for (size_t t = 0; t < tokens; ++t) {
    const float* z = logits + t * slots;
    for (size_t i = 0; i < slots; ++i) {
      for (size_t j = 0; j <= i; ++j) products[i * slots + j] += static_cast<double>(z[i]) * static_cast<double>(z[j]);
    }
  }
  for (size_t i = 0; i < slots; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      const double norms = std::sqrt(products[i * slots + i]) * std::sqrt(products[j * slots + j]);
      const double cosine = norms > 0 ? products[i * slots + j] / norms : 0.0;
      similarity[i * slots + j] += cosine;
      if (i != j) similarity[j * slots + i] += cosine;
    }
  }
}

}  // namespace

std::vector<double> logit_similarity(const Statistics& s, int64_t layer) {
  const auto n = static_cast<size_t>(s.sample_size()), slots = static_cast<size_t>(s.num_slots);
  if (n == 0) return {};
  const std::vector<float>& logits = s.layers[static_cast<size_t>(layer)].sample_logits;
  std::vector<double> similarity(slots * slots, 0.0);
  int64_t sequences = 0;
  for (size_t begin = 0, end = 0; begin < n; begin = end, ++sequences) {
    while (end < n && s.sample_sequence[end] == s.sample_sequence[begin]) ++end;
    add_cosines(&logits[begin * slots], end - begin, slots, similarity);
  }
  for (double& value : similarity) value /= static_cast<double>(sequences);
  return similarity;
}

}  // namespace lightmoe
