// state.json of a step checkpoint, and the fingerprint that says whether a run may go on from it.

#include <xxhash.h>

#include <cmath>

#include "loaders/json.h"
#include "model/checkpoint.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

constexpr const char* kFormat = "lightmoe-training-state";
constexpr int64_t kFormatVersion = 1;

// Typed access to an object of untrusted JSON.
class Fields {
 public:
  Fields(const Json& object, std::string name) : object_(object), name_(std::move(name)) {
    check(object.is_object(), ErrorKind::kInput, "{}: is {}, expected an object", name_, object.type_name());
  }
  const Json& at(const char* key) const {
    const auto found = object_.find(key);
    check(found != object_.end(), ErrorKind::kInput, "{}: \"{}\" is missing", name_, key);
    return *found;
  }
  int64_t count(const char* key) const {
    const Json& value = at(key);
    const bool fits = value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
    check(fits && value.get<int64_t>() >= 0, ErrorKind::kInput, "{}: \"{}\" is {}, expected an integer >= 0", name_,
          key, shown(value));
    return value.get<int64_t>();
  }
  double number(const char* key) const { return as_number(key, at(key)); }
  std::optional<double> maybe_number(const char* key) const {
    const Json& value = at(key);
    if (value.is_null()) return std::nullopt;
    return as_number(key, value);
  }
  std::deque<double> numbers(const char* key) const {
    const Json& list = at(key);
    check(list.is_array(), ErrorKind::kInput, "{}: \"{}\" is {}, expected a list of numbers", name_, key, shown(list));
    std::deque<double> values;
    for (const Json& value : list) values.push_back(as_number(key, value));
    return values;
  }
  std::string text(const char* key) const {
    const Json& value = at(key);
    check(value.is_string(), ErrorKind::kInput, "{}: \"{}\" is {}, expected a string", name_, key, shown(value));
    return value.get<std::string>();
  }

 private:
  double as_number(const char* key, const Json& value) const {
    check(value.is_number() && std::isfinite(value.get<double>()), ErrorKind::kInput,
          "{}: \"{}\" is {}, expected a number", name_, key, shown(value));
    return value.get<double>();
  }
  static std::string shown(const Json& value) {
    return value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 40);
  }
  const Json& object_;
  std::string name_;
};

Json optional_number(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

class Digest {
 public:
  Digest() : state_(XXH3_createState(), XXH3_freeState) {
    check(state_ != nullptr && XXH3_128bits_reset(state_.get()) == XXH_OK, ErrorKind::kMemory, "no memory to hash");
  }
  void add(const void* data, size_t bytes) {
    if (bytes > 0) XXH3_128bits_update(state_.get(), data, bytes);
  }
  void add(const std::string& text) {
    add(text.data(), text.size() + 1);
  }  // with its end, so that pieces do not run together
  std::string hex() const {
    const XXH128_hash_t hash = XXH3_128bits_digest(state_.get());
    return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
  }

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_;
};

}  // namespace

std::string state_to_json(const TrainingState& state) {
  Json json;
  json["format"] = kFormat;
  json["format_version"] = kFormatVersion;
  json["step"] = state.step;
  json["updates"] = state.updates;
  json["skipped"] = state.skipped;
  json["consecutive_skips"] = state.consecutive_skips;
  json["evaluated_step"] = state.evaluated_step;
  json["eval_loss"] = optional_number(state.eval_loss);
  json["best_eval_loss"] = optional_number(state.best_eval_loss);
  json["best_step"] = state.best_step;
  json["loss"] = state.loss;
  json["data"] = {
      {"epoch", state.data.epoch}, {"next_document", state.data.next_document}, {"offset", state.data.offset}};
  json["loss_window"] = state.losses;
  json["grad_norm_window"] = state.norms;
  json["fingerprint"] = state.fingerprint;
  json["extra"] = state.extra;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

TrainingState parse_state(const std::string& text, const std::string& name) {
  const Json json = parse_json(text, name);
  const Fields fields(json, name);
  check(fields.text("format") == kFormat, ErrorKind::kInput, "{}: format is \"{}\", expected \"{}\"", name,
        fields.text("format"), kFormat);
  check(fields.count("format_version") == kFormatVersion, ErrorKind::kInput,
        "{}: format_version is {}, this program reads {}", name, fields.count("format_version"), kFormatVersion);
  TrainingState state;
  state.step = fields.count("step");
  state.updates = fields.count("updates");
  state.skipped = fields.count("skipped");
  state.consecutive_skips = fields.count("consecutive_skips");
  state.evaluated_step = fields.count("evaluated_step");
  state.eval_loss = fields.maybe_number("eval_loss");
  state.best_eval_loss = fields.maybe_number("best_eval_loss");
  state.best_step = fields.count("best_step");
  state.loss = fields.number("loss");
  const Fields data(fields.at("data"), name + ": data");
  state.data = {.epoch = static_cast<uint64_t>(data.count("epoch")),
                .next_document = static_cast<uint64_t>(data.count("next_document")),
                .offset = static_cast<uint64_t>(data.count("offset"))};
  state.losses = fields.numbers("loss_window");
  state.norms = fields.numbers("grad_norm_window");
  const Json& fingerprint = fields.at("fingerprint");
  const Fields entries(fingerprint, name + ": fingerprint");
  for (const auto& [key, value] : fingerprint.items()) state.fingerprint[key] = entries.text(key.c_str());
  state.extra = fields.at("extra");
  check(state.updates + state.skipped <= state.step && state.best_step <= state.step &&
            state.evaluated_step <= state.step,
        ErrorKind::kInput, "{}: step {} with {} updates, {} skipped, best at {}, evaluated at {}", name, state.step,
        state.updates, state.skipped, state.best_step, state.evaluated_step);
  return state;
}

Fingerprint make_fingerprint(const std::vector<ParameterPtr>& parameters, const std::string& data,
                             const TrainerOptions& options) {
  Digest trained, frozen;
  for (const ParameterPtr& p : parameters) {
    (p->trainable ? trained : frozen)
        .add(fmt::format("{} {} {}", p->name, p->value.shape(), name_of(p->value.dtype())));
    if (!p->trainable) {
      frozen.add(p->value.on(DeviceKind::kCpu).raw(), static_cast<size_t>(p->value.bytes()));
    } else if (options.optimizer.rule) {
      const ParameterRule rule = options.optimizer.rule(*p);
      trained.add(fmt::format("{} {}", rule.lr_scale, rule.decay_scale));
    }
  }
  const Schedule& s = options.schedule;
  const OptimizerOptions& o = options.optimizer;
  Fingerprint all = options.fingerprint;
  all["version"] = version();
  all["data"] = data;
  all["trained parameters"] = trained.hex();
  all["frozen weights"] = frozen.hex();
  all["steps"] = fmt::format("{}", options.steps);
  all["accumulate"] = fmt::format("{}", options.accumulate);
  all["schedule"] = fmt::format("{}", name_of(s.kind));
  all["lr"] = fmt::format("{}", s.peak_lr);
  all["warmup"] = fmt::format("{}", s.warmup_steps);
  all["min-lr-ratio"] = fmt::format("{}", s.min_ratio);
  if (s.kind == ScheduleKind::kWsd) all["decay-fraction"] = fmt::format("{}", s.decay_fraction);
  all["betas"] = fmt::format("{} {}", o.beta1, o.beta2);
  all["eps"] = fmt::format("{}", o.eps);
  all["weight-decay"] = fmt::format("{}", o.weight_decay);
  all["clip"] = fmt::format("{}", o.clip_norm);
  all["aux-coef"] = fmt::format("{}", options.aux_coef);
  all["compute"] = options.compute == GemmCompute::kF32 ? "f32" : "bf16";
  all["spike rule"] = options.spike.window == 0 ? std::string("off")
                                                : fmt::format("{} {}", options.spike.window, options.spike.max_zscore);
  return all;
}

std::string fingerprint_difference(const Fingerprint& then, const Fingerprint& now) {
  std::string difference;
  const auto add = [&](const std::string& key, const std::string& before, const std::string& after) {
    difference += fmt::format("{}{}: {}, now {}", difference.empty() ? "" : "; ", key, before, after);
  };
  for (const auto& [key, value] : then) {
    const auto found = now.find(key);
    if (found == now.end())
      add(key, value, "absent");
    else if (found->second != value)
      add(key, value, found->second);
  }
  for (const auto& [key, value] : now) {
    if (then.count(key) == 0) add(key, "absent", value);
  }
  return difference;
}

}  // namespace lightmoe
