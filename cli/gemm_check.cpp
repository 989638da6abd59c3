// lightmoe gemm-check: is a plug-in right, and how fast is it beside what is built in?

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "cli/verb.h"
#include "kernels/gemm_check.h"
#include "kernels/gemm_plugin.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/philox.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string backend, shape = "mid";
  int64_t tokens = 64;
};

// What one token batch multiplies in a model of this shape.
struct ModelShape {
  const char* name;
  int64_t hidden, width, experts, chosen;
};
constexpr ModelShape kShapes[] = {
    {"tiny", 256, 128, 16, 4}, {"mid", 1024, 512, 32, 8}, {"olmoe-1b-7b", 2048, 1024, 64, 8}};

Tensor random_matrix(int64_t rows, int64_t columns, DType dtype) {
  const Tensor host = Tensor::empty({rows, columns}, DType::kF32, DeviceKind::kCpu);
  Philox random(static_cast<uint64_t>(rows * 31 + columns));
  for (int64_t i = 0; i < host.numel(); ++i)
    host.data<float>()[i] = static_cast<float>(random.next_u32()) * 0x1p-32f - 0.5f;
  return host.to(dtype).on(default_device());
}

// Median microseconds of 3 to 20 runs, until a quarter of a second has passed.
template <class F>
double time_us(F&& call) {
  using Clock = std::chrono::steady_clock;
  call();
  wait_for_device(default_device());
  std::vector<double> times;
  const auto begin = Clock::now();
  while (times.size() < 3 || (times.size() < 20 && Clock::now() - begin < std::chrono::milliseconds(250))) {
    const auto start = Clock::now();
    call();
    wait_for_device(default_device());
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

template <class Op>
void print_speed(const char* what, const Op& op, const GemmBackend& backend) {
  const GemmDesc d = describe(op);
  const std::string types = fmt::format("{}x{}->{}", name_of(d.a), name_of(d.b), name_of(d.c));
  const std::string size = fmt::format("{}x{}x{} g={}", d.m, d.n, d.k, d.groups);
  if (!backend.supports(d)) {
    fmt::print("{:<22} {:<16} {:<26} {:>10}\n", what, types, size, "-");
    return;
  }
  const double flop = 2e-3 * static_cast<double>(d.m) * static_cast<double>(d.n) * static_cast<double>(d.k);
  const GemmBackendScope built_in("auto");
  const std::string_view other = pick_gemm(d).name;
  const double theirs = time_us([&] { run(op); });
  const double ours = time_us([&] {
    if constexpr (std::is_same_v<Op, Gemm>) backend.dense(op);
    if constexpr (std::is_same_v<Op, GroupedGemmM>) backend.grouped_m(op);
    if constexpr (std::is_same_v<Op, GroupedGemmK>) backend.grouped_k(op);
  });
  fmt::print("{:<22} {:<16} {:<26} {:>10.1f} {:>9.1f} {:>12.1f} {:>9.1f}  {}\n", what, types, size, ours, flop / ours,
             theirs, flop / theirs, other);
}

// The products of one layer, forward and backward.
void print_speeds(const ModelShape& s, int64_t tokens, DType dtype, const GemmBackend& backend) {
  const int64_t pairs = tokens * s.chosen;
  std::vector<int32_t> offsets(static_cast<size_t>(s.experts) + 1, 0);
  Philox random(7);
  for (int64_t p = 0; p < pairs; ++p) ++offsets[1 + random.below(static_cast<uint64_t>(s.experts))];
  for (size_t g = 1; g < offsets.size(); ++g) offsets[g] += offsets[g - 1];
  const Tensor plan = Tensor::from(offsets, {s.experts + 1});
  const Tensor x = random_matrix(pairs, s.hidden, dtype), h = random_matrix(pairs, s.width, dtype);
  const GemmCompute compute = dtype == DType::kBF16 ? GemmCompute::kBF16 : GemmCompute::kF32;
  print_speed("attention projection",
              Gemm{.a = x.slice(0, tokens),
                   .b = random_matrix(s.hidden, s.hidden, dtype),
                   .c = Tensor::empty({tokens, s.hidden}, dtype),
                   .trans_b = true,
                   .compute = compute},
              backend);
  GroupedGemmM up{
      .a = x, .offsets = plan, .c = Tensor::empty({pairs, 2 * s.width}, dtype), .trans_b = true, .compute = compute};
  GroupedGemmM down{
      .a = h, .offsets = plan, .c = Tensor::empty({pairs, s.hidden}, dtype), .trans_b = true, .compute = compute};
  GroupedGemmK weights{.a = x, .b = h, .offsets = plan, .compute = compute};
  for (int64_t e = 0; e < s.experts; ++e) {
    up.b.push_back(random_matrix(2 * s.width, s.hidden, dtype));
    down.b.push_back(random_matrix(s.hidden, s.width, dtype));
    weights.c.push_back(Tensor::empty({s.hidden, s.width}, dtype));
  }
  print_speed("experts gate+up", up, backend);
  print_speed("experts down", down, backend);
  print_speed("experts dW", weights, backend);
}

const GemmBackend& backend_named(const std::string& name) {
  if (is_gemm_plugin_path(name)) return open_gemm_plugin(name);
  const GemmBackendScope known(name);  // an unknown name is refused here
  for (const GemmBackend& backend : gemm_backends()) {
    const GemmDesc desc{.kind = GemmKind::kDense,
                        .device = default_device(),
                        .a = DType::kF32,
                        .b = DType::kF32,
                        .c = DType::kF32,
                        .compute = GemmCompute::kF32,
                        .trans_a = false,
                        .trans_b = true,
                        .gather = false,
                        .m = 64,
                        .n = 64,
                        .k = 64,
                        .groups = 1,
                        .alignment = 16};
    GemmDesc small = desc;
    small.a = small.b = small.c = DType::kBF16, small.compute = GemmCompute::kBF16;
    if (backend.name == name && (backend.supports(desc) || backend.supports(small))) return backend;
  }
  fail(ErrorKind::kDevice, "GEMM backend {} does nothing on {}", name, name_of(default_device()));
}

void gemm_check(const Options& options) {
  const auto shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const ModelShape& s) { return options.shape == s.name; });
  check(shape != std::end(kShapes), ErrorKind::kUsage, "--shape {}: expected tiny, mid or olmoe-1b-7b", options.shape);
  check(options.tokens > 0, ErrorKind::kUsage, "--tokens {}: expected at least 1", options.tokens);
  const GemmBackend& backend = backend_named(options.backend);
  if (const GemmPluginInfo* info = gemm_plugin_info()) {
    fmt::print("{}: {} {}, licence {}\n", info->path, info->name, info->version,
               info->licence.empty() ? "not said" : info->licence);
  }
  std::fflush(stdout);
  const GemmCheckReport report = check_gemm_backend(backend, options.backend);
  for (const std::string& line : report.signatures) fmt::print("{}\n", line);
  fmt::print("{} products checked on {}, {} wrong; largest error {:.2f} of its tolerance\n", report.checked,
             name_of(default_device()), report.wrong, report.largest_share);
  check(report.checked > 0, ErrorKind::kDevice, "{}: supports no product on {}", options.backend,
        name_of(default_device()));
  check(report.wrong == 0, ErrorKind::kDevice, "{}: {} of {} products are wrong; the first: {}", options.backend,
        report.wrong, report.checked, report.first_wrong);
  fmt::print(
      "\n{}, {} tokens; m x n x k, microseconds (median) and GFLOP/s\n{:<22} {:<16} {:<26} {:>10} {:>9} {:>12} {:>9}\n",
      shape->name, options.tokens, "product", "types", "size", backend.name, "GFLOP/s", "built in us", "GFLOP/s");
  for (const DType dtype : {DType::kF32, DType::kBF16}) print_speeds(*shape, options.tokens, dtype, backend);
}

const RegisterVerb verb{
    {"gemm-check", "Models",
     "Hold a GEMM plug-in (or a built-in backend) to the equations and time it beside the others",
     "lightmoe gemm-check ./my_gemm.so", [](Flags& app) -> VerbAction {
       auto options = std::make_shared<Options>();
       app.add_option("backend", options->backend, "a shared object, or the name of a backend")->required();
       app.add_option("--shape", options->shape, "sizes of: tiny, mid, olmoe-1b-7b")->capture_default_str();
       app.add_option("--tokens", options->tokens, "tokens of the batch that is timed")->capture_default_str();
       return [options] { gemm_check(*options); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
