#include "model/checkpoint.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/output_internal.h"
#include "loaders/safetensors.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

constexpr const char* kStateFile = "state.json";
constexpr const char* kTensorStem = "optimizer";
constexpr int64_t kMaxStateBytes = int64_t{64} << 20;

std::string step_name(int64_t step) { return fmt::format("step-{:08}", step); }

// The step of "step-00000100", -1 for any other name.
int64_t step_of(const std::string& name) {
  if (name.rfind("step-", 0) != 0 || name.size() < 13 || name.size() > 20) return -1;
  int64_t step = 0;
  for (const char c : name.substr(5)) {
    if (c < '0' || c > '9') return -1;
    step = step * 10 + (c - '0');
  }
  return step;
}

struct StepDirectory {
  int64_t step;
  fs::path path;
};
std::vector<StepDirectory> newest_first(const fs::path& directory) {
  std::vector<StepDirectory> steps;
  std::error_code none;
  for (fs::directory_iterator it(directory, none), end; !none && it != end; it.increment(none)) {
    const int64_t step = step_of(it->path().filename().string());
    if (step >= 0 && it->is_directory(none)) steps.push_back({step, it->path()});
  }
  std::sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) { return a.step > b.step; });
  return steps;
}

fs::path state_file(const fs::path& directory) { return directory / kStateFile; }
fs::path tensor_file(const fs::path& directory) { return directory / (std::string(kTensorStem) + ".safetensors"); }

// Reads and checks one; the reason when it is no good.
std::optional<TrainingState> try_read(const fs::path& directory, std::string* why_not) {
  if (!is_complete(directory, true, why_not)) return std::nullopt;
  try {
    return parse_state(read_file(state_file(directory), kMaxStateBytes), state_file(directory).string());
  } catch (const Error& error) {
    *why_not = error.what();
    return std::nullopt;
  }
}

struct NamedTensor {
  std::string name;
  Tensor tensor;
};
// What optimizer.safetensors holds, in its order. Parameters that no update has reached have no moments.
std::vector<NamedTensor> training_tensors(Optimizer& optimizer) {
  std::vector<NamedTensor> tensors;
  for (const ParameterPtr& p : optimizer.parameters()) {
    if (!p->trainable) continue;
    tensors.push_back({"weight." + p->name, p->value});
    if (!optimizer.has_moments(*p)) continue;
    const Optimizer::Moments& moments = optimizer.moments(*p);
    tensors.push_back({"exp_avg." + p->name, moments.m});
    tensors.push_back({"exp_avg_sq." + p->name, moments.v});
    if (moments.master.defined()) tensors.push_back({"master." + p->name, moments.master});
  }
  return tensors;
}

std::vector<int64_t> dims(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int i = 0; i < tensor.rank(); ++i) shape.push_back(tensor.dim(i));
  return shape;
}

void write_tensors(const fs::path& directory, Optimizer& optimizer) {
  const std::vector<NamedTensor> tensors = training_tensors(optimizer);
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back({name, tensor.dtype(), dims(tensor)});
  SafetensorsWriter writer(directory, specs,
                           {.stem = kTensorStem, .max_shard_bytes = std::numeric_limits<int64_t>::max()});
  for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
  writer.finish();
}

}  // namespace

CheckpointStore::CheckpointStore(const CheckpointOptions& options, Warn warn)
    : options_(options), warn_(std::move(warn)) {
  if (!enabled()) {
    check(options_.resume.empty() || options_.resume == "auto", ErrorKind::kUsage,
          "--resume {}: needs a checkpoint directory to go on in", options_.resume);
    return;
  }
  check(options_.keep >= 1, ErrorKind::kUsage, "--keep {}: expected at least 1", options_.keep);
  const fs::path& directory = options_.directory;
  std::error_code error;
  fs::create_directory(directory, error);
  check(fs::is_directory(directory), ErrorKind::kUsage, "{}: cannot make the checkpoint directory: {}",
        directory.string(), error ? error.message() : "it is no directory");
  lock_ = ::open((directory / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  check(lock_ >= 0, ErrorKind::kUsage, "{}: cannot write there: {}", directory.string(), std::strerror(errno));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    ::close(lock_);
    fail(ErrorKind::kUsage, "{}: another process is training there", directory.string());
  }
  struct stat held {
  }, named{};
  const bool is_there = ::fstat(lock_, &held) == 0 && ::stat((directory / ".lock").c_str(), &named) == 0;
  check(is_there && held.st_ino == named.st_ino, ErrorKind::kUsage, "{}: another process just left; try again",
        directory.string());
  // Ours alone now: hidden step directories are what a killed process was writing or removing.
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().filename().string().rfind(".step-", 0) == 0) fs::remove_all(entry.path(), error);
  }
}

CheckpointStore::~CheckpointStore() {
  if (lock_ < 0) return;
  std::error_code ignored;
  const auto entries = std::distance(fs::directory_iterator(options_.directory, ignored), fs::directory_iterator());
  if (entries == 1) {  // our lock alone: nothing was ever saved
    fs::remove(options_.directory / ".lock", ignored);
    fs::remove(options_.directory, ignored);
  }
  ::close(lock_);
}

std::optional<CheckpointStore::Found> CheckpointStore::find(const Fingerprint& now) const {
  if (options_.resume.empty()) {
    if (!enabled()) return std::nullopt;
    const std::vector<StepDirectory> old = newest_first(options_.directory);
    check(old.empty() || options_.overwrite, ErrorKind::kUsage,
          "{}: holds checkpoints up to step {}; --resume auto goes on from there, --force starts anew",
          options_.directory.string(), old.empty() ? 0 : old.front().step);
    return std::nullopt;
  }
  const bool is_auto = options_.resume == "auto";
  const fs::path where = is_auto ? options_.directory : fs::path(options_.resume);
  std::vector<StepDirectory> candidates = newest_first(where);
  if (candidates.empty() && !is_auto) candidates.push_back({0, where});
  std::string problems;
  for (const StepDirectory& candidate : candidates) {
    std::string why_not;
    std::optional<TrainingState> state = try_read(candidate.path, &why_not);
    if (!state) {
      problems += (problems.empty() ? "" : "; ") + why_not;
      warn_(fmt::format("checkpoint {} is not used: {}", candidate.path.string(), why_not));
      continue;
    }
    const std::string difference = fingerprint_difference(state->fingerprint, now);
    check(difference.empty() || options_.resume_anyway, ErrorKind::kResume,
          "{}: was made by another run: {}. --resume-anyway goes on all the same", candidate.path.string(), difference);
    if (!difference.empty()) warn_(fmt::format("resuming anyway, although {}", difference));
    return Found{candidate.path, std::move(*state)};
  }
  check(candidates.empty(), ErrorKind::kResume, "{}: no good checkpoint to resume from: {}", where.string(), problems);
  return std::nullopt;
}

void CheckpointStore::restore(const Found& found, Optimizer& optimizer) {
  const SafetensorsFile file(tensor_file(found.directory));
  const auto info_of = [&](const std::string& name, const Tensor& like) {
    const TensorInfo* info = file.find(name);
    check(info != nullptr, ErrorKind::kResume, "{}: tensor \"{}\" is missing", file.path().string(), name);
    check(info->shape == dims(like), ErrorKind::kResume, "{}: tensor \"{}\": shape {}, expected {}",
          file.path().string(), name, Shape(info->shape), like.shape());
    return info;
  };
  // All checks before the first weight changes.
  for (const ParameterPtr& p : optimizer.parameters()) {
    if (p->trainable) info_of("weight." + p->name, p->value);
  }
  for (const ParameterPtr& p : optimizer.parameters()) {
    if (!p->trainable) continue;
    file.read_rows(*info_of("weight." + p->name, p->value), 0, p->value);
    if (file.find("exp_avg." + p->name) == nullptr) continue;
    const Optimizer::Moments& moments = optimizer.moments(*p);
    file.read_rows(*info_of("exp_avg." + p->name, moments.m), 0, moments.m);
    file.read_rows(*info_of("exp_avg_sq." + p->name, moments.v), 0, moments.v);
    if (moments.master.defined()) file.read_rows(*info_of("master." + p->name, moments.master), 0, moments.master);
  }
  optimizer.set_updates(found.state.updates);
  last_good_ = found.directory;
  std::error_code error;
  const bool is_ours = fs::equivalent(found.directory, options_.directory / step_name(found.state.step), error);
  if (is_ours) last_saved_step_ = found.state.step;
  set_aside_from(found.state.step + (is_ours ? 1 : 0));
}

void CheckpointStore::start_anew() { set_aside_from(0); }

void CheckpointStore::set_aside_from(int64_t step) const {
  if (!enabled()) return;
  for (const StepDirectory& later : newest_first(options_.directory)) {
    if (later.step < step) break;
    fs::path aside = later.path;
    aside += ".abandoned";
    for (int i = 2; fs::exists(aside); ++i) aside = fmt::format("{}.abandoned-{}", later.path.string(), i);
    rename_path(later.path, aside);
    warn_(fmt::format("{} is not of this run: renamed to {}", later.path.string(), aside.filename().string()));
  }
}

void CheckpointStore::save(const TrainingState& state, Optimizer& optimizer,
                           const std::function<void(const fs::path&)>& save_model) {
  if (!enabled() || state.step == last_saved_step_) return;
  OutputDirectory output(options_.directory / step_name(state.step), false);
  if (save_model) save_model(output.path());
  write_tensors(output.path(), optimizer);
  write_file_atomically(state_file(output.path()), state_to_json(state));
  output.commit();
  last_saved_step_ = state.step;
  last_good_ = options_.directory / step_name(state.step);
  prune(state);
}

void CheckpointStore::prune(const TrainingState& state) const {
  std::vector<fs::path> old;
  int64_t kept = 0;
  for (const StepDirectory& step : newest_first(options_.directory)) {
    const bool is_best = step.step == state.best_step && options_.save_best;
    if (kept++ >= options_.keep && !is_best) old.push_back(step.path);
  }
  if (options_.overwrite) {  // what start_anew set aside is replaced now that there is something in its place
    for (const auto& entry : fs::directory_iterator(options_.directory)) {
      const std::string name = entry.path().filename().string();
      if (name.rfind("step-", 0) == 0 && name.find(".abandoned") != std::string::npos) old.push_back(entry.path());
    }
  }
  for (const fs::path& path : old) {
    // First out of sight, so that a stop in the middle leaves no half a checkpoint under a good name.
    const fs::path hidden = options_.directory / fmt::format(".{}.removed", path.filename().string());
    rename_path(path, hidden);
    before_write();
    std::error_code left_for_the_next_start;
    fs::remove_all(hidden, left_for_the_next_start);
  }
}

}  // namespace lightmoe
