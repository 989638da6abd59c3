// Texts of faults, and the numbers that are kept.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "kernels/device/simulator/internal.h"
#include "runtime/error.h"

namespace lightmoe::simulator {

Options& options() {
  static Options instance = [] {
    Options o;
    if (const char* seed = std::getenv("LIGHTMOE_SIM_SEED")) o.seed = std::strtoull(seed, nullptr, 0);
    if (const char* chance = std::getenv("LIGHTMOE_SIM_PREEMPT")) o.preempt = std::atof(chance);
    if (const char* timing = std::getenv("LIGHTMOE_SIM_ASYNC")) {
      const std::string name = timing;
      o.async = name == "early" ? AsyncTiming::kEarly : name == "random" ? AsyncTiming::kRandom : AsyncTiming::kLate;
    }
    return o;
  }();
  return instance;
}

Statistics& statistics() {
  static Statistics instance;
  return instance;
}

void Statistics::add(const Statistics& other) {
  switches += other.switches;
  collectives += other.collectives;
  barriers += other.barriers;
  mma += other.mma;
  wgmma += other.wgmma;
  ldmatrix += other.ldmatrix;
  ldmatrix_conflicts += other.ldmatrix_conflicts;
  cp_async += other.cp_async;
  bulk_copies += other.bulk_copies;
}

namespace {

struct LaunchRecord {
  const char* file = std::getenv("LIGHTMOE_SIM_LAUNCHES");
  std::mutex mutex;
  std::map<std::string, size_t> most_shared;
  ~LaunchRecord() {
    if (file == nullptr) return;
    std::ofstream out(file);
    for (const auto& [kernel, bytes] : most_shared) out << kernel << "  " << bytes << " bytes\n";
  }
};

}  // namespace

void record_launch(const char* kernel, const Grid& grid) {
  static LaunchRecord record;
  if (record.file == nullptr) return;
  const std::lock_guard<std::mutex> lock(record.mutex);
  size_t& most = record.most_shared[kernel_name(kernel)];
  most = std::max(most, grid.shared_bytes);
}

std::string place(Site site) {
  if (site.file == nullptr) return "?";
  const char* slash = std::strrchr(site.file, '/');
  return fmt::format("{}:{}", slash != nullptr ? slash + 1 : site.file, site.line);
}

// g++ writes "[with auto kKernel = lightmoe::sim::{anonymous}::k<float>; Arguments = ...]", clang "[kKernel = &..., Arguments = ...]".
std::string kernel_name(const char* pretty) {
  std::string text = pretty;
  const size_t key = text.find("kKernel = ");
  if (key == std::string::npos) return text;
  text = text.substr(key + std::strlen("kKernel = "));
  size_t end = text.find("; Arguments");
  if (end == std::string::npos) end = text.find(", Arguments");
  text = text.substr(0, end);
  for (const char* noise : {"&", "lightmoe::sim::", "lightmoe::", "{anonymous}::", "(anonymous namespace)::"}) {
    for (size_t at; (at = text.find(noise)) != std::string::npos;) text.erase(at, std::strlen(noise));
  }
  return text;
}

std::string describe(const Block& block) {
  return fmt::format("kernel {} launched at {}, block ({},{},{})", kernel_name(block.kernel), place(block.launched),
                     block.index.x, block.index.y, block.index.z);
}

void raise_fault(const char* kind, Site site, const std::string& message) {
  Thread* thread = current();
  const std::string text = fmt::format("sim: {}: {}; at {}", kind, message, place(site));
  if (thread == nullptr || thread->block == nullptr || thread == &thread->block->launcher)
    fail(ErrorKind::kDevice, "{}", text);
  Block& block = *thread->block;
  if (block.error.empty()) {
    block.error = fmt::format("{}; {}, thread ({},{},{}) (warp {} lane {})", text, describe(block), thread->index.x,
                              thread->index.y, thread->index.z, thread->linear / 32, thread->lane);
  }
  throw Fault{};
}

void trap(Site site) { raise_fault("trap", site, "trap() was called"); }

}  // namespace lightmoe::simulator
