#!/bin/sh
# Compiles every kernel for sm_80 and sm_90a with nvcc, warnings as errors, and fails on register spills or on ptxas's repair
# messages (C75xx: a wgmma pipeline that the assembler had to serialise).   usage: check_ptxas.sh NVCC FLAGS FILE.cu...
set -eu
nvcc=$1 flags=$2
shift 2
out=build/cuda
mkdir -p "$out"
failed=0
for source in "$@"; do
  log=$out/$(basename "$source" .cu).log
  # shellcheck disable=SC2086
  "$nvcc" $flags -I. -Xptxas -v,-warn-spills \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -c "$source" -o "$out/$(basename "$source" .cu).o" \
    >"$log" 2>&1 || { echo "cuda: $source does not compile:" >&2; cat "$log" >&2; failed=1; continue; }
  if grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]' "$log" >&2; then
    echo "cuda: $source: spills or repaired wgmma (above)" >&2
    failed=1
  fi
done
[ "$failed" -eq 0 ] || exit 1
echo "cuda: $# files compiled for sm_80 and sm_90a, no spills"
