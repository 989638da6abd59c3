#!/bin/sh
# Makes the demo's base model from nothing but this repository: data, tokenizer, random weights, training.
#   demo/make_base.sh [OUT]        OUT defaults to demo/base; work files go to build/demo
# Variables: STEPS, SEED. The result and the time it took are in demo/README.md.
set -eu
cd "$(dirname "$0")/.."
out=${1:-demo/base}
steps=${STEPS:-2400}
seed=${SEED:-1}
work=build/demo
make --no-print-directory build/lightmoe build/demo-generate_data build/demo-train_tokenizer
mkdir -p "$work"

build/demo-generate_data "$work/data"
build/demo-train_tokenizer "$work/data/pretrain.jsonl" "$work/tokenizer"
build/lightmoe random demo/base_config.json -o "$work/random" --dtype f32 --seed "$seed" --force
cp "$work/tokenizer/tokenizer.json" "$work/tokenizer/tokenizer_config.json" "$work/random/"

build/lightmoe train "$work/random" --data "$work/data/pretrain.jsonl" \
  --eval-data "$work/data/pretrain_validation.jsonl" --eval-every 250 \
  --batch-rows 24 --length 96 --steps "$steps" --seed "$seed" \
  --lr 3e-3 --warmup 60 --schedule wsd --decay-fraction 0.7 --min-lr-ratio 0.02 \
  --weight-decay 0.05 --betas 0.9 0.95 --clip 1 \
  --save-dtype bf16 -o "$out" --force --log "$work/base.log.jsonl" --checkpoints "$work/base.checkpoints"

for task in math code recall recall_choice intent translation; do
  build/lightmoe eval "$out" --task "$work/data/$task/test.jsonl" --batch 100
done
