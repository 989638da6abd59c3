#include "runtime/trace.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <vector>

#include "runtime/error.h"

namespace lightmoe {
namespace {

struct Event {
  TraceLevel level;
  std::string name;
  int64_t payload;
  double begin_us, end_us;
};
std::atomic<bool> enabled{false};
std::mutex mutex;
std::vector<Event> events;
std::chrono::steady_clock::time_point origin;

double now_us() { return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - origin).count(); }

}  // namespace

bool trace_enabled() { return enabled.load(std::memory_order_relaxed); }

void trace_start() {
  const std::lock_guard<std::mutex> lock(mutex);
  events.clear();
  origin = std::chrono::steady_clock::now();
  enabled = true;
}

void TraceRange::begin(TraceLevel level, const char* name, int64_t payload, int layer) {
  const std::lock_guard<std::mutex> lock(mutex);
  index_ = events.size();
  active_ = true;
  events.push_back(
      {level, layer >= 0 ? fmt::format("L{:02}.{}", layer, name) : std::string(name), payload, now_us(), -1});
}
void TraceRange::end() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (index_ < events.size()) events[index_].end_us = now_us();
}

void trace_write(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  enabled = false;
  constexpr const char* kLevels[] = {"step", "phase", "layer", "op"};
  std::FILE* file = std::fopen(path.c_str(), "w");
  check(file != nullptr, ErrorKind::kIo, "{}: cannot be written", path);
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  bool first = true;
  for (const Event& e : events) {
    if (e.end_us < 0) continue;
    text += fmt::format(
        "{}\n{{\"name\":\"{}\",\"cat\":\"{}\",\"ph\":\"X\",\"ts\":{:.3f},\"dur\":{:.3f},\"pid\":1,"
        "\"tid\":1",
        first ? "" : ",", e.name, kLevels[static_cast<int>(e.level)], e.begin_us, e.end_us - e.begin_us);
    text += e.payload >= 0 ? fmt::format(",\"args\":{{\"payload\":{}}}}}", e.payload) : "}";
    first = false;
  }
  text += "\n]}\n";
  const bool ok = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  check((std::fclose(file) == 0) && ok, ErrorKind::kIo, "{}: write failed", path);
  events.clear();
}

}  // namespace lightmoe
