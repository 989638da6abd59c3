#include "runtime/trace.h"

#include <charconv>
#include <chrono>
#include <cstdio>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "runtime/error.h"
#include "runtime/trace_nvtx.h"

namespace lightmoe {
namespace {

struct Event {
  TraceLevel level;
  std::string name;
  int64_t payload;
  double begin_us, end_us;
};
std::mutex mutex;
std::vector<Event> events;
std::chrono::steady_clock::time_point origin;
bool collecting = false, nvtx = false;

struct Steps {
  int64_t first, last;
};
std::optional<Steps> wanted;  // all when absent
bool inside = true;           // the step that runs is wanted

void update() { detail::trace_on = (collecting || nvtx) && inside; }

double now_us() { return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - origin).count(); }

}  // namespace

const char* name_of(TraceLevel level) {
  constexpr const char* kNames[] = {"step", "phase", "layer", "op"};
  return kNames[static_cast<int>(level)];
}

void trace_start() {
  const std::lock_guard<std::mutex> lock(mutex);
  events.clear();
  origin = std::chrono::steady_clock::now();
  collecting = true;
  update();
}

bool nvtx_available() { return nvtx_built(); }

void nvtx_start() {
  check(nvtx_built(), ErrorKind::kDevice,
        "NVTX ranges: this build has none (the CUDA toolkit's headers were not there)");
  const std::lock_guard<std::mutex> lock(mutex);
  nvtx = true;
  update();
}

void profile_steps(int64_t first, int64_t last) {
  const std::lock_guard<std::mutex> lock(mutex);
  wanted = Steps{first, last};
  inside = false;
  update();
}

void profile_steps(const std::string& range) {
  const auto number = [&](std::string_view text) {
    int64_t value = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    check(error == std::errc() && end == text.data() + text.size() && value >= 0, ErrorKind::kUsage,
          "steps to profile '{}': expected A:B or A, two numbers", range);
    return value;
  };
  const size_t colon = range.find(':');
  const int64_t first = number(std::string_view(range).substr(0, colon));
  const int64_t last = colon == std::string::npos ? first : number(std::string_view(range).substr(colon + 1));
  check(first <= last, ErrorKind::kUsage, "steps to profile '{}': the first is after the last", range);
  profile_steps(first, last);
}

void profile_step(int64_t step) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!wanted) return;
  const bool now = step >= wanted->first && step <= wanted->last;
  if (now == inside) return;
  inside = now;
  update();
  now ? profiler_start() : profiler_stop();
}

void TraceRange::begin(TraceLevel level, const char* name, int64_t payload, int layer) {
  const std::lock_guard<std::mutex> lock(mutex);
  active_ = true;
  if (nvtx) nvtx_push({level, name, payload, layer}), pushed_ = true;
  if (!collecting) return;
  index_ = static_cast<int64_t>(events.size());
  events.push_back(
      {level, layer >= 0 ? fmt::format("L{:02}.{}", layer, name) : std::string(name), payload, now_us(), -1});
}
void TraceRange::end() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (pushed_) nvtx_pop();
  if (index_ >= 0 && index_ < static_cast<int64_t>(events.size()))
    events[static_cast<size_t>(index_)].end_us = now_us();
}

void trace_write(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  collecting = false;
  update();
  std::FILE* file = std::fopen(path.c_str(), "w");
  check(file != nullptr, ErrorKind::kIo, "{}: cannot be written", path);
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  bool first = true;
  for (const Event& e : events) {
    if (e.end_us < 0) continue;
    text += fmt::format(
        "{}\n{{\"name\":\"{}\",\"cat\":\"{}\",\"ph\":\"X\",\"ts\":{:.3f},\"dur\":{:.3f},\"pid\":1,"
        "\"tid\":1",
        first ? "" : ",", e.name, name_of(e.level), e.begin_us, e.end_us - e.begin_us);
    text += e.payload >= 0 ? fmt::format(",\"args\":{{\"payload\":{}}}}}", e.payload) : "}";
    first = false;
  }
  text += "\n]}\n";
  const bool ok = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  check((std::fclose(file) == 0) && ok, ErrorKind::kIo, "{}: write failed", path);
  events.clear();
}

}  // namespace lightmoe
