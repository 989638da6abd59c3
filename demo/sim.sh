#!/bin/sh
# A slice of the demo with the GPU's kernels on the simulator (`make demo-sim`): calibrate, compress, recover with annealing, evaluate,
# generate, the device's memory closed to the host. The recovery's losses must be those of the CPU within 1 %.
set -eu
cd "$(dirname "$0")/.."
export LIGHTMOE_SIM_GUARD=1
make --no-print-directory build/demo-generate_data
[ -f out/demo-data/.complete ] || { build/demo-generate_data out/demo-data && touch out/demo-data/.complete; }
out=out/demo-sim data=out/demo-data/code
rm -rf $out out/demo-sim-*
mkdir -p $out
build/lightmoe calibrate demo/base --data $data/train.jsonl --num-tokens 96 --length 48 --sample-tokens 32 --device sim \
  -o $out/stats.safetensors > $out/calibrate.txt
build/lightmoe compress demo/base --stats $out/stats.safetensors --ratio 0.5 --bases 2 --rank 4 -o $out/half > $out/compress.txt
for device in cpu sim; do
  build/lightmoe recover $out/half --base demo/base --data $data/train.jsonl --steps 3 --anneal 0.5 --lr 3e-3 --warmup 1 \
    --batch-rows 1 --length 48 --quiet --no-checkpoint-model --device $device -o $out/$device
  grep -o '"loss":[^,}]*' $out/$device.log.jsonl | cut -d: -f2 > $out/$device.losses
done
paste $out/cpu.losses $out/sim.losses | awk '
  { d = ($1 > $2 ? $1 - $2 : $2 - $1) / $1; if (d > worst) worst = d }
  END { printf "recovery, %d steps: losses of cpu and sim differ by at most %.2g of them\n", NR, worst; exit !(NR == 3 && worst < 0.01) }'
build/lightmoe eval $out/sim --task $data/test.jsonl --limit 2 --no-hash --device sim
head -n 1 $data/test.jsonl > $out/prompt.jsonl
build/lightmoe generate $out/sim --prompts $out/prompt.jsonl --max-new-tokens 6 --ignore-eos --device sim
