// lightmoe-bench: Google Benchmark over ops, GEMM backends and whole models. Its flags are Google Benchmark's:
//   build/lightmoe-bench --benchmark_filter='^model/tiny' --benchmark_repetitions=5 --benchmark_out=x.json
// The context of the JSON names commit, processor, threads and BLAS core, so that a figure can be traced.

#include <benchmark/benchmark.h>

#include <fstream>
#include <string>

#include "runtime/parallel.h"
#include "runtime/version.h"

namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("commit", lightmoe::version());
  benchmark::AddCustomContext("processor", processor_name());
  benchmark::AddCustomContext("threads", std::to_string(lightmoe::num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
