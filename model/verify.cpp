#include "model/verify.h"

#include <map>
#include <set>

#include "loaders/finite_scan.h"
#include "loaders/json.h"
#include "loaders/marker.h"
#include "loaders/output.h"
#include "loaders/safetensors_header.h"
#include "loaders/tokenizer.h"
#include "model/summary.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

class Verifier {
 public:
  Verifier(const std::filesystem::path& directory, const VerifyOptions& options)
      : directory_(directory), options_(options) {}

  VerifyReport run() {
    attempt([&] { read_marker_if_there(); });
    attempt([&] {
      const OlmoeConfig config = read_config(directory_);
      const Checkpoint files(directory_);
      check_tensors(config, files);
      attempt([&] { check_tokenizer(config); });
      if (options_.values) scan_values(files);
    });
    if (options_.hashes) attempt([&] { check_hashes(); });
    return std::move(report_);
  }

 private:
  template <class... Args>
  void problem(fmt::format_string<Args...> format, Args&&... args) {
    report_.problems.push_back(fmt::format(format, std::forward<Args>(args)...));
  }

  template <class F>
  void attempt(F&& f) {
    try {
      f();
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kInput) throw;
      report_.problems.emplace_back(error.what());
    }
  }

  void read_marker_if_there() {
    if (!std::filesystem::exists(directory_ / kMarkerName)) {
      report_.notes.emplace_back("no completeness marker (not written by this program): hashes cannot be compared");
      return;
    }
    for (MarkerEntry& entry : read_marker(directory_)) {
      std::string name = entry.name;
      marker_.emplace(std::move(name), std::move(entry));
    }
    std::string why;
    if (!is_complete(directory_, false, &why)) report_.problems.push_back(std::move(why));
  }

  // Every file of the marker whose bytes were not hashed on the way.
  void check_hashes() {
    for (const auto& [name, entry] : marker_) {
      const auto known = hashes_.find(name);
      const std::string hash = known != hashes_.end() ? known->second : hash_file(directory_ / name);
      if (hash != entry.hash) {
        problem("{}: contents changed since written (XXH3-128 {}, was {})", (directory_ / name).string(), hash,
                entry.hash);
      }
    }
  }

  void check_tensors(const OlmoeConfig& config, const Checkpoint& files) {
    const std::string config_name = (directory_ / "config.json").string();
    report_.layout = layout_name(config, files);
    report_.in_files = static_cast<int64_t>(files.names().size());
    std::set<std::string> known;
    for (const ParameterInfo& p : expected_parameters(config, files, config_name)) {
      known.insert(p.name);
      check_one(p, files);
    }
    for (const std::string& name : files.names()) {
      if (known.contains(name)) continue;
      if (name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")) {
        report_.notes.push_back(fmt::format("tensor \"{}\" is there and not used", printable(name)));
        continue;
      }
      ++report_.unexpected;
      problem("{}: tensor \"{}\" {} is not one that {} asks for", files.file_of(name).path().string(), printable(name),
              shape_text(files.info(name).shape), config_name);
    }
  }

  void check_tokenizer(const OlmoeConfig& config) {
    const std::filesystem::path file = directory_ / "tokenizer.json";
    if (!std::filesystem::exists(file)) return;
    const int64_t ids = Tokenizer::load(directory_).vocab_size();
    if (ids > config.vocab_size) {
      problem("{}: has ids up to {}, but vocab_size in config.json is {}; is this another model's tokenizer?",
              file.string(), ids - 1, config.vocab_size);
    }
  }

  void check_one(const ParameterInfo& p, const Checkpoint& files) {
    ++report_.expected;
    if (!files.contains(p.name)) {
      problem("{}: tensor \"{}\" {} is missing", directory_.string(), p.name, shape_text(p.shape));
      return;
    }
    const TensorInfo& info = files.info(p.name);
    const std::string where = fmt::format("{}: tensor \"{}\"", files.file_of(p.name).path().string(), p.name);
    if (info.shape != p.shape) {
      problem("{}: shape {}, expected {} (config.json)", where, shape_text(info.shape), shape_text(p.shape));
    } else if (!info.dtype() || !is_floating(*info.dtype())) {
      problem("{}: dtype {}, expected F32, BF16, F16 or F64", where, info.file_dtype);
    } else {
      ++report_.matched;
    }
  }

  void scan_values(const Checkpoint& files) {
    const int64_t all = files.total_bytes();
    for (const SafetensorsFile& file : files.files()) {
      const FileScan scan = scan_file(file, [&](int64_t bytes) {
        report_.bytes += bytes;
        if (options_.progress) options_.progress(report_.bytes, all);
      });
      hashes_.emplace(file.path().filename().string(), scan.hash);
      for (size_t i = 0; i < scan.tensors.size(); ++i) account(file, file.tensors()[i], scan.tensors[i]);
    }
  }

  void account(const SafetensorsFile& file, const TensorInfo& info, const FiniteScan& scan) {
    ++report_.scanned;
    report_.values += scan.elements;
    report_.nonfinite += scan.nonfinite;
    if (scan.nonfinite == 0) return;
    problem("{}: tensor \"{}\": {} of {} values are not finite, the first is {} at index {}", file.path().string(),
            printable(info.name), scan.nonfinite, scan.elements, scan.first_value, scan.first);
  }

  const std::filesystem::path& directory_;
  const VerifyOptions& options_;
  VerifyReport report_;
  std::map<std::string, MarkerEntry> marker_;  // by name
  std::map<std::string, std::string> hashes_;  // of files read on the way
};

}  // namespace

VerifyReport verify_model(const std::filesystem::path& directory, const VerifyOptions& options) {
  check(std::filesystem::is_directory(directory), ErrorKind::kInput,
        "{}: is not a directory; verify takes a model directory", directory.string());
  return Verifier(directory, options).run();
}

}  // namespace lightmoe
