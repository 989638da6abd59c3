#pragma once
// Compression methods. A method is one file with a function (experts, statistics, budget, options) -> plan and one line
//   static const RegisterMethod method{{.name = "lightmoe", ..., .plan = &plan_lightmoe}};
// Nothing else in the program knows which method ran: the plan says what is stored, the fields below what recovery trains.

#include <string>
#include <string_view>
#include <vector>

#include "compress/plan.h"
#include "compress/selection.h"
#include "compress/statistics.h"

namespace lightmoe {

class ExpertSource;

enum class AdapterInit : uint8_t {
  kGaussian,  // A normal with variance 1 / (3 in), B zero: what LoRA implementations start from, drawn normal as the paper says
  kSvd,          // best rank-R approximation of original - base. Not in the paper.
  kWhitenedSvd,  // the same for the inputs that occur (compress/residuals.h); needs a sample of them. Not in the paper.
};
// How the replacing methods share out N R adapter ranks over N replaced slots.
enum class RankAllocation : uint8_t {
  kEqual,   // R each
  kEnergy,  // where most of what the bases miss is kept (compress/rank_allocation.h). Not in the paper.
};
RankAllocation parse_rank_allocation(std::string_view name);
const char* name_of(RankAllocation allocation);
AdapterInit parse_adapter_init(std::string_view name);
const char* name_of(AdapterInit init);

// Of the methods whose slots are latents (struct Latent in model/moe.h); 0 = the method's own choice.
struct LatentOptions {
  int64_t size = 0;       // M; else the largest that the budget allows
  int64_t group = 8;      // MoLAE: experts that share a projection
  int64_t bases = 0;      // MoBE, SLBF: projections that are mixed
  bool down = false;      // down matrices are factors too (SLBF: always)
  int64_t fit_steps = 0;  // MoBE, SLBF: of the fit to the weights
  bool operator==(const LatentOptions&) const = default;
};

struct MethodOptions {
  Budget budget;
  SelectionOptions selection;
  int64_t bases = 3;        // M, per layer
  int64_t rank = 16;        // R of LightMoE
  int64_t method_rank = 0;  // R of the method at hand; 0 = as many trainable parameters as LightMoE with M and R
  AdapterInit adapter_init = AdapterInit::kGaussian;
  double adapter_std = 0;  // of A; 0 = 1 / sqrt(3 in)
  RankAllocation rank_allocation = RankAllocation::kEqual;
  bool align =
      false;  // hidden units of a base's members are permuted to its dominant's before the mean. Not in the paper.
  uint64_t seed = 1;
  // Pruning: a removed slot answers with the survivor most like it instead of being masked (arXiv 2605.13997, compress/pruning.h).
  bool redirect = false;
  // Merging: down matrices of merged experts are fitted again (arXiv 2510.14436, compress/merging.h). Reads a sample of inputs.
  bool refit = false;
  LatentOptions latent;
};

struct MethodInput {
  const OlmoeConfig& config;
  const Statistics& statistics;
  const MethodOptions& options;
  double bytes_per_parameter = 2;         // as written, for a budget in GiB
  const ExpertSource* experts = nullptr;  // original weights, read on demand; null in pure arithmetic
  // In pure arithmetic (a recipe is described) nothing is there but the config and uniform statistics: a plan's sizes must be right,
  // its choices need not be. What all this refers to lives as long as the plan's computed tensors may be asked for.
};

enum class Trainable : uint8_t {
  kNothing,
  kEverything,
  kAdapters,          // those of the replaced slots, and new ones on every other slot
  kBasesAndAdapters,  // bases in full rank as well
  kBasesAndFactors,  // bases in full rank, and of the plan's adapters the kinds of factors that trained_factors() names
};
// Kinds of an adapter's factors, as bits of a set.
enum AdapterFactor : uint8_t { kBGate = 1, kBUp = 2, kBDown = 4, kADown = 8, kAGateUp = 16, kAllFactors = 31 };

// What a method reads beside the weights.
enum class Needs : uint8_t {
  kNothing,
  kSums,           // what every calibration collects
  kAllOutputs,     // calibrate --all-outputs
  kInputs,         // calibrate --sample-inputs
  kBoth,           // both of them
  kUnitGradients,  // calibrate --unit-gradients
  kTokens,         // the token sample itself, which every calibration keeps
};
inline bool needs_all_outputs(Needs n) { return n == Needs::kAllOutputs || n == Needs::kBoth; }
inline bool needs_unit_gradients(Needs n) { return n == Needs::kUnitGradients; }
inline bool needs_inputs(Needs n) { return n == Needs::kInputs || n == Needs::kBoth; }

struct Method {
  std::string name, summary;
  std::string paper = "";  // arXiv id
  std::string slots =
      "";  // kinds of slots beside untouched experts: "removed", "shared", "adapter", "constant", "latent", "narrow"
  Plan (*plan)(const MethodInput&);
  int64_t (*rank)(const MethodInput&) = nullptr;  // of the adapters in recovery; null: see recovery_rank
  Trainable trainable = Trainable::kNothing;
  Needs needs = Needs::kNothing;
  bool train_free = false;  // published as usable without training
  double anneal = 0;        // default eps; 0 = direct
  bool compresses = false;  // takes a budget
  bool redirects = false;   // takes --redirect: it removes slots
  bool merges = false;      // takes --refit: it averages experts
  bool featured = false;    // what reports show in most detail; one method is
};

// Error(kUsage) when an option asks for what the method does not do: --redirect, --refit.
void check_options(const Method& method, const MethodOptions& options);
// What the method reads with these options beside the weights: some need more.
bool reads_inputs(const Method& method, const MethodOptions& options);
bool reads_unit_gradients(const Method& method, const MethodOptions& options);
// "nothing", "statistics", "mean outputs over all tokens", "a sample of inputs"
const char* name_of(Needs needs);
// Error(kUsage) when the statistics lack what the method reads with these options; saying how to calibrate.
void check_needs(const Method& method, const MethodOptions& options, const Statistics& statistics);

struct RegisterMethod {
  explicit RegisterMethod(Method method);
};
const std::vector<Method>& methods();              // sorted by name
const Method& find_method(std::string_view name);  // Error(kUsage) with the names and the nearest

// Parameters that LightMoE trains with M bases and rank R on all slots, and the rank at which adapters on all slots beside
// `bases` trained bases per layer come closest to that (at least 1).
int64_t lightmoe_trainable(const ModelSize& size, int64_t bases, int64_t rank);
int64_t matched_rank(const MethodInput& input, int64_t bases);
// The method's rank, else (where adapters train) the one at which the adapters of this plan come closest to LightMoE's number;
// 0 where no adapter trains.
int64_t recovery_rank(const Method& method, const MethodInput& input, const Plan& plan);
// Where a plan's adapters are more than LightMoE trains in all (D2-MoE's are most of the model): the kinds of factors that train beside the
// bases so that their number comes nearest to LightMoE's, the same kinds in every slot; all for other methods.
uint8_t trained_factors(const Method& method, const MethodInput& input, const Plan& plan);
// What the method trains under this plan, the adapters that recovery adds counted.
int64_t trainable_parameters(const Method& method, const MethodInput& input, const Plan& plan);

}  // namespace lightmoe
