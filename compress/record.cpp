#include "compress/record.h"

#include "loaders/json.h"
#include "loaders/output.h"
#include "model/config.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

constexpr int kFormat = 1;
constexpr int64_t kMaxRecordBytes = int64_t{64} << 20;
constexpr const char* kSideFiles[] = {
    "tokenizer.json", "tokenizer_config.json",  "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",     "generation_config.json", "chat_template.jinja",     "chat_template.json"};

const Json& member(const Json& object, const char* key, const std::string& name) {
  check(object.is_object() && object.contains(key), ErrorKind::kInput, "{}: key \"{}\" is missing", name, key);
  return object[key];
}
std::string text(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  check(value.is_string(), ErrorKind::kInput, "{}: \"{}\" is not a string", name, key);
  return value.get<std::string>();
}
int64_t integer(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  check(value.is_number_integer() && value >= 0, ErrorKind::kInput, "{}: \"{}\" is {}, expected a number", name, key,
        value.dump());
  return value.get<int64_t>();
}

Json options_to_json(const CompressionRecord& r) {
  const MethodOptions& o = r.options;
  constexpr const char* kRules[] = {"adaptive", "average", "uniform"};
  constexpr const char* kStarved[] = {"unimportant", "keep", "error"};
  return {{"budget", r.budget},
          {"selection", kRules[static_cast<int>(o.selection.rule)]},
          {"alpha", o.selection.alpha},
          {"clip", o.selection.clip},
          {"starved", kStarved[static_cast<int>(o.selection.starved)]},
          {"bases", o.bases},
          {"rank", r.rank},
          {"trained_factors", r.factors},
          {"redirect", o.redirect},
          {"refit", o.refit},
          {"adapter_init", name_of(o.adapter_init)},
          {"adapter_std", o.adapter_std},
          {"importance", name_of(o.selection.importance)},
          {"rank_allocation", name_of(o.rank_allocation)},
          {"align", o.align},
          {"latent",
           {{"size", o.latent.size},
            {"group", o.latent.group},
            {"bases", o.latent.bases},
            {"down", o.latent.down},
            {"fit_steps", o.latent.fit_steps}}},
          {"seed", o.seed}};
}

Json coverage_to_json(const Coverage& c) {
  return {{"tensors_seen", c.seen}, {"copied", c.copied},   {"changed", c.changed},
          {"dropped", c.dropped},   {"skipped", c.skipped}, {"non_finite_values", c.non_finite}};
}

}  // namespace

std::string record_to_json(const CompressionRecord& r, const Json& recovery) {
  Json root = {
      {"format", kFormat},
      {"version", r.version},
      {"method", r.method},
      {"options", options_to_json(r)},
      {"model", r.model},
      {"statistics", r.statistics},
      {"parameters",
       {{"original", r.original_parameters}, {"stored", r.stored_parameters}, {"trainable", r.trainable_parameters}}},
      {"bytes", {{"original", r.original_bytes}, {"stored", r.stored_bytes}}},
      {"coverage", coverage_to_json(r.coverage)}};
  if (!recovery.is_null()) root["recovery"] = recovery;
  root["plan"] = to_json(r.plan);
  return root.dump(1) + "\n";
}

CompressionRecord read_record(const std::filesystem::path& directory) {
  const std::string name = (directory / kRecordFile).string();
  check(std::filesystem::exists(directory / kRecordFile), ErrorKind::kInput,
        "{}: no such file; the directory is not what `lightmoe compress` writes", name);
  const Json root = parse_json(read_file(directory / kRecordFile, kMaxRecordBytes), name);
  check(integer(root, "format", name) == kFormat, ErrorKind::kInput, "{}: format {}, this version reads format {}",
        name, root["format"].dump(), kFormat);
  const OlmoeConfig config = read_config(directory);
  std::vector<LayerShape> shapes(static_cast<size_t>(config.num_layers), plain_layer_shape(config.num_experts));
  if (!config.lightmoe_json.empty()) {
    const std::string config_name = (directory / "config.json").string();
    shapes = slot_tables_from_json(parse_json(config.lightmoe_json, config_name), config, config_name);
  }
  CompressionRecord r{.version = text(root, "version", name), .method = text(root, "method", name)};
  const Json& options = member(root, "options", name);
  r.budget = text(options, "budget", name);
  r.options.bases = integer(options, "bases", name);
  r.rank = r.options.method_rank = integer(options, "rank", name);
  check(r.rank <= config.hidden_size, ErrorKind::kInput, "{}: rank {} is larger than the hidden size", name, r.rank);
  r.options.seed = static_cast<uint64_t>(integer(options, "seed", name));
  r.options.adapter_init = parse_adapter_init(text(options, "adapter_init", name));
  const Json& stddev = member(options, "adapter_std", name);
  check(stddev.is_number(), ErrorKind::kInput, "{}: \"adapter_std\" is not a number", name);
  r.options.adapter_std = stddev.get<double>();
  r.options.align = options.value("align", false);  // older records have none
  r.factors = static_cast<uint8_t>(options.value("trained_factors", int64_t{kAllFactors}) & kAllFactors);
  r.model = text(root, "model", name);
  r.statistics = text(root, "statistics", name);
  const Json& parameters = member(root, "parameters", name);
  r.original_parameters = integer(parameters, "original", name);
  r.stored_parameters = integer(parameters, "stored", name);
  r.trainable_parameters = integer(parameters, "trainable", name);
  const Json& bytes = member(root, "bytes", name);
  r.original_bytes = integer(bytes, "original", name);
  r.stored_bytes = integer(bytes, "stored", name);
  r.plan = plan_from_json(member(root, "plan", name), shapes, name);
  return r;
}

void copy_side_files(const std::filesystem::path& from, const std::filesystem::path& to) {
  for (const char* file : kSideFiles) {
    if (std::filesystem::is_regular_file(from / file)) copy_file_bytes(from / file, to / file);
  }
}

}  // namespace lightmoe
