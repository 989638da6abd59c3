#include "kernels/gemm_tuning.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>

#include "kernels/gemm_plugin.h"
#include "kernels/gemm_text.h"
#include "runtime/device.h"
#include "runtime/device_info.h"
#include "runtime/parallel.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

constexpr const char* kFirstLine = "lightmoe gemm tuning 1";

struct Entry {
  std::string backend;
  double microseconds;
};
struct State {
  std::mutex mutex;
  std::string file;
  bool measure = false, changed = false;
  std::map<std::string, Entry> entries;
};
State& state() {
  static State tuning;
  return tuning;
}

int64_t bucket(int64_t rows) {
  return rows <= 1 ? rows : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
}

// An epilogue does not change what the product is: the backend that is fastest without it.
std::string key_of(GemmDesc desc) {
  desc.epilogue = GemmEpilogueKind::kNone;
  int64_t& rows = desc.kind == GemmKind::kGroupedK ? desc.k : desc.m;
  rows = bucket(rows);
  return fmt::format("{} align={}", text_of(desc), desc.alignment);
}

std::string validators() {
  const DeviceInfo info = device_info(default_device());
  std::string text = fmt::format("validator version\t{}\nvalidator device\t{} {}\nvalidator units\t{}\n", version(),
                                 name_of(default_device()), info.name, info.multiprocessors);
  if (!info.driver.empty()) text += fmt::format("validator driver\t{} runtime {}\n", info.driver, info.runtime);
  if (const GemmPluginInfo* plugin = gemm_plugin_info()) {
    text += fmt::format("validator plugin\t{} {} {:016x}\n", plugin->name, plugin->version, plugin->file_hash);
  }
  return text;
}

// Empty when the file is this machine's; else what differs.
std::string read_entries(const std::string& path, std::map<std::string, Entry>& entries) {
  std::ifstream file(path);
  check(file.good(), ErrorKind::kIo, "{}: cannot be read", path);
  std::string line, found;
  std::getline(file, line);
  if (line != kFirstLine) return fmt::format("its first line is not '{}'", kFirstLine);
  std::map<std::string, Entry> read;
  while (std::getline(file, line)) {
    if (line.rfind("validator ", 0) == 0) {
      found += line + "\n";
      continue;
    }
    const size_t first = line.find('\t'), second = line.find('\t', first + 1);
    if (first == std::string::npos || second == std::string::npos) return "a line is not: shape, backend, microseconds";
    std::istringstream number(line.substr(second + 1));
    double microseconds = -1;
    number >> microseconds;
    if (!(microseconds > 0)) return fmt::format("no time in '{}'", line);
    read[line.substr(0, first)] = {line.substr(first + 1, second - first - 1), microseconds};
  }
  if (found != validators()) return "it was measured by another version, device or plug-in";
  entries.merge(read);
  return "";
}

// Least microseconds of up to 10 runs within 30 ms, after one that is not counted.
double time_us(const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  call();
  wait_for_device(default_device());
  double best = std::numeric_limits<double>::infinity();
  const auto begin = Clock::now();
  for (int i = 0; i < 10 && (i == 0 || Clock::now() - begin < std::chrono::milliseconds(30)); ++i) {
    const auto start = Clock::now();
    call();
    wait_for_device(default_device());
    best = std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  return best;
}

// Plain loops are not worth timing where something else can do it.
bool worth_timing(const GemmBackend& backend, size_t candidates) {
  return candidates < 2 || backend.name != "reference";
}

// The product alone, with a C of its own.
template <class Op>
Op scratch_of(Op op, const GemmDesc& desc) {
  const bool swiglu = desc.epilogue == GemmEpilogueKind::kSwiGlu || desc.epilogue == GemmEpilogueKind::kSwiGluBackward;
  op.c = swiglu ? Tensor::empty({(op.c.defined() ? op.c : op.epilogue.activated).dim(0), desc.n}, desc.c, desc.device)
                : op.c.clone();
  op.epilogue = {};
  return op;
}

template <class Call>
void measure(GemmDesc desc, Call&& call) {
  State& s = state();
  desc.epilogue = GemmEpilogueKind::kNone;
  const std::string key = key_of(desc);
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    if (!s.measure || s.entries.count(key) > 0 || forced_gemm_backend() != "auto") return;
  }
  std::vector<const GemmBackend*> candidates;
  for (const GemmBackend& backend : gemm_backends()) {
    if (backend.supports(desc)) candidates.push_back(&backend);
  }
  Entry best{"", std::numeric_limits<double>::infinity()};
  for (const GemmBackend* backend : candidates) {
    if (!worth_timing(*backend, candidates.size())) continue;
    const double microseconds = time_us([&] { call(*backend); });
    if (microseconds < best.microseconds) best = {std::string(backend->name), microseconds};
  }
  if (best.backend.empty()) return;
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.entries[key] = best;
  s.changed = true;
}

}  // namespace

void use_gemm_tuning(const std::string& file, bool measure, const std::function<void(const std::string&)>& warn) {
  State& s = state();
  std::map<std::string, Entry> entries;
  if (std::filesystem::exists(file)) {
    const std::string reason = read_entries(file, entries);
    if (!reason.empty() && warn) warn(fmt::format("{}: ignored, {}", file, reason));
  } else {
    check(measure, ErrorKind::kUsage, "{}: no such tuning file; --gemm-tune measures one", file);
  }
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.file = file, s.measure = measure, s.changed = false, s.entries = std::move(entries);
}

void stop_gemm_tuning() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.file.clear(), s.measure = s.changed = false, s.entries.clear();
}

void write_gemm_tuning() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.changed) return;
  if (std::filesystem::exists(s.file)) read_entries(s.file, s.entries);  // what another process measured meanwhile
  const std::string temporary = fmt::format("{}.{}.tmp", s.file, getpid());
  {
    std::ofstream file(temporary);
    file << kFirstLine << "\n" << validators();
    for (const auto& [key, entry] : s.entries)
      file << fmt::format("{}\t{}\t{:.3f}\n", key, entry.backend, entry.microseconds);
    file.close();
    if (!file.good()) {
      std::filesystem::remove(temporary);
      fail(ErrorKind::kIo, "{}: cannot be written", temporary);
    }
  }
  std::filesystem::rename(temporary, s.file);
  s.changed = false;
}

std::string_view tuned_gemm_backend(const GemmDesc& desc) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.entries.empty()) return {};
  const auto found = s.entries.find(key_of(desc));
  return found == s.entries.end() ? std::string_view() : std::string_view(found->second.backend);
}

void tune_gemm(const Gemm& op, const GemmDesc& desc) {
  if (!state().measure) return;
  measure(desc, [&, scratch = std::optional<Gemm>()](const GemmBackend& backend) mutable {
    if (!scratch) scratch = scratch_of(op, desc);
    backend.dense(*scratch);
  });
}

void tune_gemm(const GroupedGemmM& op, const GemmDesc& desc) {
  if (!state().measure) return;
  measure(desc, [&, scratch = std::optional<GroupedGemmM>()](const GemmBackend& backend) mutable {
    if (!scratch) scratch = scratch_of(op, desc);
    backend.grouped_m(*scratch);
  });
}

void tune_gemm(const GroupedGemmK& op, const GemmDesc& desc) {
  if (!state().measure) return;
  measure(desc, [scratch = op, copied = false](const GemmBackend& backend) mutable {
    std::map<const void*, Tensor> copies;  // groups that share an output go on sharing it
    for (Tensor& c : scratch.c) {
      if (copied || !c.defined()) continue;
      Tensor& copy = copies[c.raw()];
      if (!copy.defined()) copy = c.clone();
      c = copy;
    }
    copied = true;
    backend.grouped_k(scratch);
  });
}

}  // namespace lightmoe
