#!/usr/bin/env bash
# Everything that wants a GPU, in one command: device and clocks, every op and model test on the GPU, the same under
# compute-sanitizer for the small ones, then the benchmarks; logs and JSON into $OUT (build/gpu-check when unset).
# Runs the programs of `make gpu-build` (build/gpu, which holds the libraries they need, too: a machine with nothing but a driver runs
# them). Every part runs even when one before it failed; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu-check}
mkdir -p "$out"
failed=0
part() {
  local name=$1
  shift
  local begin=$SECONDS
  if "$@" > "$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - begin)) s)"
  else
    echo "FAILED  $name ($((SECONDS - begin)) s), the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
    failed=1
  fi
}

export LD_LIBRARY_PATH=$PWD/build/gpu/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
[ -x build/gpu/device-tests ] || { echo "gpu-check: no build/gpu/device-tests; run make gpu-build where nvcc is" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total --format=csv > "$out/device.csv" 2>&1 ||
  { echo "gpu-check: no GPU here: $(head -n 1 "$out/device.csv")" >&2; exit 9; }
date -u +%Y-%m-%dT%H:%M:%SZ >> "$out/device.csv"
cat build/gpu/version >> "$out/device.csv"

part tests env LIGHTMOE_TEST_DEVICES=cuda build/gpu/device-tests --gtest_brief=1 --gtest_output="json:$out/tests.json"
part models env LIGHTMOE_TEST_DEVICES=cuda build/gpu/model-device-tests --gtest_brief=1 --gtest_output="json:$out/models.json"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    part "sanitizer-$tool" env LIGHTMOE_TEST_DEVICES=cuda timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      build/gpu/device-tests --gtest_brief=1 --gtest_filter='RmsNorm*:Router*:Gemm*Small*:DispatchPlan*'
  done
fi
part bench-ops env LIGHTMOE_BENCH_DEVICE=cuda build/gpu/lightmoe-bench --benchmark_filter='^op/' --benchmark_min_time=0.05 \
  --benchmark_out="$out/ops.json" --benchmark_out_format=json
part bench-gemm env LIGHTMOE_BENCH_DEVICE=cuda build/gpu/lightmoe-bench --benchmark_filter='^gemm/(simple|mma|wgmma|cublas)/' \
  --benchmark_min_time=0.05 --benchmark_out="$out/gemm.json" --benchmark_out_format=json
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv >> "$out/device.csv" 2>&1
exit $failed
