#!/usr/bin/env bash
# Everything that wants a GPU, in one command: every op and model test on the GPU, small ones under compute-sanitizer, training curves of
# CPU and GPU side by side, the demo, the benchmarks, and PyTorch's figures where it is. Into $OUT (build/gpu-check when unset) go
# summary.txt, device.csv, ops.json, gemm.json, layer.json, model.json, peers.jsonl, demo.md and logs.tar.gz (logs and JSON of the tests). Runs the programs of `make gpu-build`
# (build/gpu, or build/gpu.tar.xz unpacked); cuBLAS is the machine's own. Each part has a time limit, and the limits add up to
# GPU_CHECK_SECONDS (570), so that a hang does not cost the rest; every part runs even when one before it failed. The exit status says
# whether all passed.
# GPU_CHECK_FULL=1 adds the benchmarks at OLMoE's own size, 40 minutes at most.
# GPU_CHECK_ONLY=REGEX runs the parts whose names match, e.g. GPU_CHECK_FULL=1 GPU_CHECK_ONLY=bench-olmoe-model.
# GPU_CHECK_DEVICE=sim runs the same parts on the simulator, to try this script where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu-check}
pack=build/gpu
device=${GPU_CHECK_DEVICE:-cuda}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
mkdir -p "$out"
total=${GPU_CHECK_SECONDS:-570}
failed=0
summary="$out/summary.txt"
: > "$summary"

row() { printf '%-22s %-8s %5s s  %s\n' "$@" | tee -a "$summary"; }
# part NAME LIMIT COMMAND...: LIMIT is in seconds of 570. The command's last line of output stands in the summary.
part() {
  local name=$1 limit=$(($2 * total / 570)) begin=$SECONDS code last
  shift 2
  [[ $name =~ ${GPU_CHECK_ONLY:-.} ]] || return 0
  timeout --kill-after=5 "$limit" "$@" > "$logs/$name.log" 2>&1
  code=$?
  last=$(grep -v '^[[:space:]]*$' "$logs/$name.log" | tail -n 1 | cut -c1-110)
  if ((code == 0)); then
    row "$name" ok $((SECONDS - begin)) "$last"
    return 0
  fi
  failed=1
  if ((code == 124 || code == 137)); then row "$name" TIMEOUT $((SECONDS - begin)) "$last"; else row "$name" FAILED $((SECONDS - begin)) "exit $code: $last"; fi
  return 1
}
skip() { [[ ! $1 =~ ${GPU_CHECK_ONLY:-.} ]] || row "$1" skipped 0 "$2"; }

[ -x $pack/device-tests ] || [ ! -f $pack.tar.xz ] || tar -C build -xJf $pack.tar.xz
[ -x $pack/device-tests ] || { echo "gpu-check: no $pack/device-tests; run make gpu-build where nvcc is" >&2; exit 2; }
query=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total
ask_device() { if [ "$device" = cuda ]; then nvidia-smi --query-gpu="$1" --format=csv; else printf 'name\n%s\n' "$device"; fi; }
ask_device $query > "$out/device.csv" 2>&1 ||
  { echo "gpu-check: no GPU here: $(head -n 1 "$out/device.csv")" >&2; exit 9; }
{ date -u +%Y-%m-%dT%H:%M:%SZ; cat $pack/version; } >> "$out/device.csv"

# cuBLAS is larger than everything else together: the toolkit's, or that of a Python package.
if [ "$device" = cuda ] && ! ldconfig -p | grep -q 'libcublasLt\.so'; then
  cublas=$(find -L /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib /usr/lib/python3* /usr/local/lib/python3* /opt -name 'libcublasLt.so.*' 2>/dev/null | head -n 1)
  [ -n "$cublas" ] || echo "gpu-check: warning: no libcublasLt.so found; the programs need it" >&2
fi
export LD_LIBRARY_PATH=$PWD/$pack/lib${cublas:+:$(dirname "$cublas")}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

on_gpu=(env "LIGHTMOE_TEST_DEVICES=$device")
# The fastest answer to "does anything run": one op, one product, one whole model, each kernel waited for.
part first-kernels 30 "${on_gpu[@]}" LIGHTMOE_SYNC=1 $pack/device-tests --gtest_brief=1 --gtest_filter='Add*:Elementwise*:RmsNorm*'
part ops 100 "${on_gpu[@]}" $pack/device-tests --gtest_brief=1 --gtest_output="json:$logs/ops-tests.json"
part models 50 "${on_gpu[@]}" $pack/model-device-tests --gtest_brief=1 --gtest_output="json:$logs/models-tests.json"

sanitizer=$(command -v compute-sanitizer || find -L /usr/local/cuda* /opt -name compute-sanitizer -type f 2>/dev/null | head -n 1)
for tool in memcheck racecheck initcheck synccheck; do
  if [ -z "$sanitizer" ]; then
    skip "sanitizer-$tool" "no compute-sanitizer here"
  else
    part "sanitizer-$tool" 15 "${on_gpu[@]}" "$sanitizer" --tool $tool --error-exitcode 1 \
      $pack/device-tests --gtest_brief=1 --gtest_filter='RmsNorm*:Router.*:DispatchPlan*:SampleTokens.KeepsByHand:ScatterRows*:Graph*:CudaPtx*:AdapterChain.TwoSlots*:Attention.LargeScores*'
  fi
done

# The same ten steps on CPU and GPU: losses of the log, which must agree within 2 %.
data=$logs/train.jsonl
for i in $(seq 1 64); do echo "{\"prompt\": \"$i+$((i * 7 % 50))=\", \"completion\": \"$((i + i * 7 % 50))\"}"; done > "$data"
curve() {
  $pack/lightmoe train demo/base --data "$data" --steps 10 --lr 1e-3 --batch-rows 8 --length 64 --quiet \
    --no-checkpoint-model --device "$1" -o "$logs/curve-$1"
  grep -o '"loss":[^,}]*' "$logs/curve-$1.log.jsonl" | cut -d: -f2 > "$logs/curve-$1.txt"
}
compare_curves() {
  curve cpu && curve "$device" && paste "$logs/curve-cpu.txt" "$logs/curve-$device.txt" | awk '
    { d = ($1 > $2 ? $1 - $2 : $2 - $1) / $1; if (d > worst) worst = d; print NR, $1, $2 }
    END { printf "%d steps, largest relative difference %.2g\n", NR, worst; exit !(NR == 10 && worst < 0.02) }'
}
export -f curve compare_curves
export pack logs data device
part curves 30 bash -c compare_curves
part generate 10 $pack/lightmoe generate demo/base --prompt '47+85=' --prompt '12+30=' --device "$device" --max-new-tokens 32 --ignore-eos

demo() {  # on the simulator, where a recovery takes minutes, what is not trained
  local only=
  [ "$device" = cuda ] || only=original
  [ -f out/demo-data/.complete ] || { $pack/demo-generate_data out/demo-data && touch out/demo-data/.complete; }
  $pack/lightmoe run recipes/demo.toml --short --device "$device" ${only:+--only "$only"} && cp out/demo-short/report.md "$out/demo.md"
}
export -f demo
export out
part demo 50 bash -c demo

bench=(env LIGHTMOE_BENCH_DEVICE="$device" $pack/lightmoe-bench --benchmark_min_time=0.05 --benchmark_out_format=json)
# All ops and products, one layer at OLMoE's shape and a middle-sized model, original and compressed; on the simulator what is small.
if [ "$device" = cuda ]; then
  ops='' gemm='(simple|gemv|mma|wgmma|cublas)/(dense|grouped)' layer='olmoe-1b-7b/.*/uniform/(64|4096)/'
  model='mid/(original|lightmoe-50)/bf16/(prefill|generate|train_step/|recovery_step/)'
else
  ops='(rms_norm|swiglu)(_backward)?/f32/[0-9]{1,2}x[0-9]{1,3}/' gemm='(mma|wgmma)/olmoe/down/uniform/1/' layer='tiny/.*/uniform/1/'
  model='tiny/(original|lightmoe-50)/bf16/prefill_last'
fi
part bench-ops 60 "${bench[@]}" --benchmark_filter="^op/$ops" --benchmark_out="$out/ops.json"
part bench-gemm 50 "${bench[@]}" --benchmark_filter="^gemm/$gemm" --benchmark_out="$out/gemm.json"
part bench-layer 40 "${bench[@]}" --benchmark_filter="^layer/$layer" --benchmark_out="$out/layer.json"
part bench-model 40 "${bench[@]}" --benchmark_repetitions=3 --benchmark_report_aggregates_only=true \
  --benchmark_filter="^model/$model" --benchmark_out="$out/model.json"
# Hugging Face's OLMoE on the same machine: peers FILE OPTIONS...
peers() {
  local file=$out/$1.jsonl
  shift
  python3 scripts/peer_pytorch.py --device cuda --dtype bf16 "$@" > "$file" && tail -n 1 "$file"
}
export -f peers
if [ "$device" = cuda ] && python3 -c 'import torch, transformers' 2> /dev/null; then
  part peers 50 bash -c 'peers peers --shape mid --repeat 5'
else
  skip peers "no GPU, or no PyTorch with transformers"
fi
# OLMoE's own size, which takes minutes: all its products, layers and phases.
if [ -n "${GPU_CHECK_FULL:-}" ]; then
  part bench-olmoe-gemm 600 "${bench[@]}" --benchmark_filter='^gemm/[^/]*/olmoe/' --benchmark_out="$out/olmoe-gemm.json"
  part bench-olmoe-layer 600 "${bench[@]}" --benchmark_filter='^layer/olmoe-1b-7b/' --benchmark_out="$out/olmoe-layer.json"
  part bench-olmoe-model 600 "${bench[@]}" --benchmark_repetitions=3 --benchmark_report_aggregates_only=true \
    --benchmark_filter='^model/olmoe-1b-7b/' --benchmark_out="$out/olmoe-model.json"
  for experts in eager grouped_mm; do
    part "olmoe-peers-$experts" 300 bash -c "peers olmoe-peers-$experts --shape olmoe-1b-7b --experts $experts --repeat 10 \
      --only prefill --only generate --only train_step --only lora_step"
  done
fi
ask_device clocks.sm,clocks.mem,temperature.gpu >> "$out/device.csv" 2>&1

rm -rf "$logs"/curve-*/
tar -C "$logs" -czf "$out/logs.tar.gz" .
echo
echo "gpu-check: $(head -n 2 "$out/device.csv" | tail -n 1)"
cat "$summary"
for log in $(awk '$2 == "FAILED" || $2 == "TIMEOUT" { print $1 }' "$summary"); do
  echo "--- the end of $log"
  tail -n 12 "$logs/$log.log"
done
exit $failed
