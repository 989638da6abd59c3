#include "compress/registry.h"

#include <algorithm>
#include <cmath>

#include "runtime/nearest.h"

namespace lightmoe {
namespace {

std::vector<Method>& registered() {
  static std::vector<Method> list;
  return list;
}

}  // namespace

AdapterInit parse_adapter_init(std::string_view name) {
  if (name == "gaussian") return AdapterInit::kGaussian;
  if (name == "svd") return AdapterInit::kSvd;
  if (name == "svd-whitened") return AdapterInit::kWhitenedSvd;
  fail(ErrorKind::kUsage, "adapter-init \"{}\": expected gaussian, svd or svd-whitened", name);
}

const char* name_of(AdapterInit init) {
  constexpr const char* kNames[] = {"gaussian", "svd", "svd-whitened"};
  return kNames[static_cast<int>(init)];
}

RankAllocation parse_rank_allocation(std::string_view name) {
  if (name == "equal") return RankAllocation::kEqual;
  if (name == "energy") return RankAllocation::kEnergy;
  fail(ErrorKind::kUsage, "rank-allocation \"{}\": expected equal or energy", name);
}

const char* name_of(RankAllocation allocation) { return allocation == RankAllocation::kEnergy ? "energy" : "equal"; }

const char* name_of(Needs needs) {
  switch (needs) {
    case Needs::kNothing:
      return "nothing";
    case Needs::kSums:
      return "statistics";
    case Needs::kAllOutputs:
      return "mean outputs over all tokens";
    case Needs::kInputs:
      return "a sample of inputs";
    case Needs::kBoth:
      return "mean outputs, inputs";
    case Needs::kUnitGradients:
      return "unit gradients";
    case Needs::kTokens:
      return "a sample of tokens";
  }
  return "?";
}

namespace {

// The methods that a flag is for.
std::string methods_with(bool Method::*flag) {
  std::string list;
  for (const Method& method : methods()) {
    if (method.*flag) list += (list.empty() ? "" : ", ") + method.name;
  }
  return list;
}

}  // namespace

void check_options(const Method& method, const MethodOptions& options) {
  check(!options.redirect || method.redirects, ErrorKind::kUsage,
        "{} takes no --redirect; those that do, because they mask slots: {}", method.name,
        methods_with(&Method::redirects));
  check(!options.refit || method.merges, ErrorKind::kUsage,
        "{} takes no --refit; those that do, because they average experts: {}", method.name,
        methods_with(&Method::merges));
}

bool reads_inputs(const Method& method, const MethodOptions& options) {
  return needs_inputs(method.needs) || options.adapter_init == AdapterInit::kWhitenedSvd || options.refit;
}

bool reads_unit_gradients(const Method& method, const MethodOptions& options) {
  return needs_unit_gradients(method.needs) || options.selection.importance == Importance::kTaylor;
}

void check_needs(const Method& method, const MethodOptions& options, const Statistics& statistics) {
  const LayerStatistics& layer = statistics.layers.front();
  check(!options.refit || !layer.sample_inputs.empty(), ErrorKind::kUsage,
        "--refit needs {}: give --stats with a file of `lightmoe calibrate --sample-inputs`", name_of(Needs::kInputs));
  check(!needs_inputs(method.needs) || !layer.sample_inputs.empty(), ErrorKind::kUsage,
        "{} needs {}: give --stats with a file of `lightmoe calibrate --sample-inputs`", method.name,
        name_of(method.needs));
  check(!needs_all_outputs(method.needs) || !layer.all_output.empty(), ErrorKind::kUsage,
        "{} needs {}: give --stats with a file of `lightmoe calibrate --all-outputs`", method.name,
        name_of(method.needs));
  check(!needs_unit_gradients(method.needs) || !layer.unit_gradient2.empty(), ErrorKind::kUsage,
        "{} needs {}: give --stats with a file of `lightmoe calibrate --unit-gradients`", method.name,
        name_of(method.needs));
  check(method.needs != Needs::kTokens || !statistics.sample_ids.empty(), ErrorKind::kUsage,
        "{} needs {}: give --stats with a file of `lightmoe calibrate` (--sample-tokens above 0)", method.name,
        name_of(method.needs));
}

RegisterMethod::RegisterMethod(Method method) {
  std::vector<Method>& list = registered();
  const auto place = std::lower_bound(list.begin(), list.end(), method,
                                      [](const Method& a, const Method& b) { return a.name < b.name; });
  list.insert(place, std::move(method));
}

const std::vector<Method>& methods() { return registered(); }

const Method& find_method(std::string_view name) {
  std::vector<std::string> names;
  std::string list;
  for (const Method& method : methods()) {
    if (method.name == name) return method;
    names.push_back(method.name);
    list += (list.empty() ? "" : ", ") + method.name;
  }
  const std::string near = nearest(std::string(name), names);
  fail(ErrorKind::kUsage, "unknown method \"{}\"{}; there are {}", name,
       near.empty() ? "" : fmt::format(", did you mean {}?", near), list);
}

int64_t lightmoe_trainable(const ModelSize& size, int64_t bases, int64_t rank) {
  return size.layers * (bases * size.expert + size.slots * rank * size.adapter_unit);
}

int64_t matched_rank(const MethodInput& input, int64_t bases) {
  const MethodOptions& options = input.options;
  if (options.method_rank > 0) return options.method_rank;
  const ModelSize size = model_size(input.config);
  const int64_t left = lightmoe_trainable(size, options.bases, options.rank) - size.layers * bases * size.expert;
  const double rank = static_cast<double>(left) / static_cast<double>(size.layers * size.slots * size.adapter_unit);
  return std::max<int64_t>(1, std::llround(rank));
}

int64_t recovery_rank(const Method& method, const MethodInput& input, const Plan& plan) {
  if (method.rank != nullptr) return method.rank(input);
  if (method.trainable != Trainable::kAdapters) return 0;
  const MethodOptions& options = input.options;
  if (options.method_rank > 0) return options.method_rank;
  const ModelSize size = model_size(input.config);
  const auto all = static_cast<double>(lightmoe_trainable(size, options.bases, options.rank));
  int64_t planned = 0, unit = 0;  // adapters the plan has; those that recovery adds, at rank 1
  for (const LayerShape& shape : plan.shapes()) planned += adapter_parameters(shape, size);
  for (const LayerShape& shape : with_adapters(plan.shapes(), 1)) unit += adapter_parameters(shape, size);
  unit = std::max<int64_t>(1, unit - planned);
  return std::max<int64_t>(1, std::llround((all - static_cast<double>(planned)) / static_cast<double>(unit)));
}

namespace {

int64_t base_parameters(const Plan& plan, const ModelSize& size) {
  int64_t sum = 0;
  for (const LayerPlan& layer : plan.layers) sum += static_cast<int64_t>(layer.bases.size()) * size.expert;
  return sum;
}

// Of the plan's own adapters.
int64_t factor_parameters(const Plan& plan, const ModelSize& size, uint8_t factors) {
  int64_t sum = 0;
  for (const LayerPlan& layer : plan.layers) {
    for (size_t a = 0; a < layer.shape.adapter_rank.size(); ++a) {
      const int64_t r = layer.shape.adapter_rank[a], f = layer.shape.width_of_adapter(a, size.width);
      const int64_t units = ((factors & kBGate) != 0) + ((factors & kBUp) != 0) + ((factors & kADown) != 0);
      sum += r * f * units + r * size.hidden * (((factors & kBDown) != 0) + 2 * ((factors & kAGateUp) != 0));
    }
  }
  return sum;
}

}  // namespace

uint8_t trained_factors(const Method& method, const MethodInput& input, const Plan& plan) {
  if (method.trainable != Trainable::kBasesAndFactors) return kAllFactors;
  const ModelSize size = model_size(input.config);
  const int64_t wanted =
      lightmoe_trainable(size, input.options.bases, input.options.rank) - base_parameters(plan, size);
  uint8_t best = 0;
  for (uint8_t set = 1; set <= kAllFactors; ++set) {
    const auto miss = [&](uint8_t s) { return std::abs(factor_parameters(plan, size, s) - wanted); };
    if (miss(set) < miss(best)) best = set;
  }
  return best;
}

int64_t trainable_parameters(const Method& method, const MethodInput& input, const Plan& plan) {
  const ModelSize size = model_size(input.config);
  if (method.trainable == Trainable::kBasesAndFactors) {
    return base_parameters(plan, size) + factor_parameters(plan, size, trained_factors(method, input, plan));
  }
  if (method.trainable == Trainable::kNothing) return 0;
  if (method.trainable == Trainable::kEverything) return size.total();
  int64_t sum = 0;
  for (const LayerShape& shape : with_adapters(plan.shapes(), recovery_rank(method, input, plan))) {
    sum += adapter_parameters(shape, size);
  }
  return method.trainable == Trainable::kBasesAndAdapters ? sum + base_parameters(plan, size) : sum;
}

}  // namespace lightmoe
