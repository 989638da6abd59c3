// gemm/BACKEND/KIND/TRANS/TYPES/MxNxKgG, TYPES: A x B -> C in storage, "as bf16" where the products are in bf16.
// Counters: GFLOP/s of the median repetition's mean, best_GFLOP/s of the fastest iteration (for machines that are not idle),
// GB/s of A, B and C read and written once.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <string>

#include "bench/op_bench.h"
#include "kernels/gemm.h"
#include "runtime/philox.h"
#include "tests/cases/gemm.h"

namespace {

using namespace lightmoe;

struct Types {
  const char* name;
  DType a, b, c;
  GemmCompute compute;
};
constexpr Types kTypes[] = {
    {"f32", DType::kF32, DType::kF32, DType::kF32, GemmCompute::kF32},
    {"f32_as_bf16", DType::kF32, DType::kF32, DType::kF32, GemmCompute::kBF16},
    {"f32xbf16", DType::kF32, DType::kBF16, DType::kF32, GemmCompute::kF32},
    {"f32xbf16_as_bf16", DType::kF32, DType::kBF16, DType::kF32, GemmCompute::kBF16},
    {"bf16_as_bf16", DType::kBF16, DType::kBF16, DType::kBF16, GemmCompute::kBF16},
};

Tensor random_matrix(int64_t rows, int64_t columns, DType dtype) {
  const Tensor values = Tensor::empty({rows, columns}, DType::kF32, DeviceKind::kCpu);
  Philox random(static_cast<uint64_t>(rows * 31 + columns));
  for (int64_t i = 0; i < values.numel(); ++i) values.data<float>()[i] = static_cast<float>(random.uniform()) - 0.5f;
  return values.to(dtype).on(default_device());
}

Tensor random_offsets(int64_t rows, int64_t groups) {
  std::vector<int32_t> offsets(static_cast<size_t>(groups) + 1, 0);
  Philox random(7);
  for (int64_t r = 0; r < rows; ++r) {
    const bool one_each = rows == groups;
    ++offsets[1 + (one_each ? static_cast<size_t>(r) : random.below(static_cast<uint64_t>(groups)))];
  }
  for (size_t g = 0; g < static_cast<size_t>(groups); ++g) offsets[g + 1] += offsets[g];
  return Tensor::from(offsets, {groups + 1});
}

// The operands of a case and the call; bytes() counts each of them once.
struct Work {
  std::vector<Tensor> all;
  std::function<void()> call;
  Tensor keep(const Tensor& t) {
    all.push_back(t);
    return t;
  }
  double bytes() const {
    double sum = 0;
    for (const Tensor& t : all) sum += static_cast<double>(t.bytes());
    return sum;
  }
};

Work make_work(const cases::GemmBenchCase& c, const Types& t) {
  Work work;
  const std::string kind = c.kind;
  const bool trans_a = c.trans[0] == 't', trans_b = c.trans[1] == 't';
  const auto weights = [&] { return work.keep(trans_b ? random_matrix(c.n, c.k, t.b) : random_matrix(c.k, c.n, t.b)); };
  if (kind == "dense") {
    const Tensor a = work.keep(trans_a ? random_matrix(c.k, c.m, t.a) : random_matrix(c.m, c.k, t.a));
    const Gemm op{.a = a,
                  .b = weights(),
                  .c = work.keep(Tensor::zeros({c.m, c.n}, t.c)),
                  .trans_a = trans_a,
                  .trans_b = trans_b,
                  .compute = t.compute};
    work.call = [op] { run(op); };
  } else if (kind == "grouped_m") {
    GroupedGemmM op{.a = work.keep(random_matrix(c.m, c.k, t.a)),
                    .offsets = random_offsets(c.m, c.groups),
                    .trans_b = trans_b,
                    .compute = t.compute};
    for (int64_t g = 0; g < c.groups; ++g) op.b.push_back(weights());
    op.c = work.keep(Tensor::zeros({c.m, c.n}, t.c));
    work.call = [op] { run(op); };
  } else {
    GroupedGemmK op{.a = work.keep(random_matrix(c.k, c.m, t.a)),
                    .b = work.keep(random_matrix(c.k, c.n, t.b)),
                    .offsets = random_offsets(c.k, c.groups),
                    .compute = t.compute};
    for (int64_t g = 0; g < c.groups; ++g) op.c.push_back(work.keep(Tensor::zeros({c.m, c.n}, t.c)));
    work.call = [op] { run(op); };
  }
  return work;
}

// Does this backend have an entry for the device of the moment that takes the case?
bool is_supported(const std::string& backend, const cases::GemmBenchCase& c, const Types& t) {
  const std::string kind = c.kind;
  const GemmDesc desc{.kind = kind == "dense"       ? GemmKind::kDense
                              : kind == "grouped_m" ? GemmKind::kGroupedM
                                                    : GemmKind::kGroupedK,
                      .device = default_device(),
                      .a = t.a,
                      .b = t.b,
                      .c = t.c,
                      .compute = t.compute,
                      .trans_a = c.trans[0] == 't',
                      .trans_b = c.trans[1] == 't',
                      .gather = false,
                      .m = c.m,
                      .n = c.n,
                      .k = c.k,
                      .groups = c.groups,
                      .alignment = 16};
  return std::any_of(gemm_backends().begin(), gemm_backends().end(),
                     [&](const GemmBackend& b) { return b.name == backend && b.supports(desc); });
}

void time_case(benchmark::State& state, const std::string& backend, const cases::GemmBenchCase& c, const Types& t) {
  if (!is_supported(backend, c, t)) return state.SkipWithError("not for this device, kind or types");
  const GemmBackendScope scope(backend);
  const Work work = make_work(c, t);
  const double flop = 2.0 * static_cast<double>(c.m) * static_cast<double>(c.n) * static_cast<double>(c.k);
  bench::measure(state, {.bytes = work.bytes(), .flops = flop, .run = work.call}, false);
  if (default_device() != DeviceKind::kCuda) return;
  const bench::Ceilings& best = bench::measured_ceilings();
  const double ceiling = t.a == DType::kBF16 || t.compute == GemmCompute::kBF16 ? best.bf16_flop : best.f32_flop;
  state.counters["of_gemm"] = state.counters["best_GFLOP/s"].value * 1e9 / ceiling;
}

// By name, because the backends' own registration may come after this one.
const bool registered = [] {
  for (const char* const backend : {"native", "blas", "reference", "simple", "gemv", "mma", "wgmma", "cublas"}) {
    for (const cases::GemmBenchCase& c : cases::gemm_bench) {
      if (std::string_view(backend) == "reference" && c.m * c.n * c.k > int64_t{1} << 30) continue;  // seconds a call
      for (const Types& t : kTypes) {
        const std::string name =
            fmt::format("gemm/{}/{}/{}/{}/{}x{}x{}g{}", backend, c.kind, c.trans, t.name, c.m, c.n, c.k, c.groups);
        const auto time = [backend = std::string(backend), c, t](benchmark::State& s) { time_case(s, backend, c, t); };
        benchmark::RegisterBenchmark(name.c_str(), time)->UseManualTime()->MinTime(0.2)->Unit(benchmark::kMicrosecond);
      }
    }
  }
  return true;
}();

}  // namespace
