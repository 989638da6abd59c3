// lightmoe-bench: Google Benchmark over ops, GEMM backends and whole models. Its flags are Google Benchmark's:
//   build/lightmoe-bench --benchmark_filter='^model/tiny' --benchmark_repetitions=5 --benchmark_out=x.json
// The context of the JSON names commit, processor, threads and BLAS core, so that a figure can be traced.

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/device_info.h"
#include "runtime/error.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/version.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  const char* device = std::getenv("LIGHTMOE_BENCH_DEVICE");
  if (device != nullptr) {
    try {
      lightmoe::set_default_device(lightmoe::device_named(device));
      lightmoe::Buffer::allocate(1, lightmoe::default_device(), lightmoe::MemoryCategory::kScratch);
    } catch (const lightmoe::Error& error) {
      std::fprintf(stderr, "error[E%d] LIGHTMOE_BENCH_DEVICE: %s\n", error.exit_code(), error.what());
      return error.exit_code();
    }
  }
  benchmark::AddCustomContext("device", std::string(name_of(lightmoe::default_device())));
  benchmark::AddCustomContext("commit", lightmoe::version());
  benchmark::AddCustomContext("processor", lightmoe::device_info(lightmoe::default_device()).name);
  benchmark::AddCustomContext("threads", std::to_string(lightmoe::num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
