#!/bin/sh
# Compiles every kernel for sm_80 and sm_90a with nvcc, as many files at a time as there are cores, warnings as errors; fails on register
# spills and on ptxas's repair messages (C75xx: a wgmma pipeline that the assembler had to serialise).
# usage: check_ptxas.sh NVCC FLAGS FILE.cu...
set -eu
if [ "$1" = --one ]; then  # NVCC FLAGS FILE, called by the line at the end
  nvcc=$2 flags=$3 source=$4
  out=build/cuda/$(basename "$source" .cu)
  # shellcheck disable=SC2086
  "$nvcc" $flags -I. -Xptxas -v,-warn-spills -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    -c "$source" -o "$out.o" >"$out.log" 2>&1 || { echo "cuda: $source does not compile:" >&2; cat "$out.log" >&2; exit 1; }
  if grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]' "$out.log" >&2; then
    echo "cuda: $source: spills or repaired wgmma (above)" >&2
    exit 1
  fi
  exit 0
fi
nvcc=$1 flags=$2
shift 2
mkdir -p build/cuda
printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} "$0" --one "$nvcc" "$flags" {} || exit 1
echo "cuda: $# files compiled for sm_80 and sm_90a, no spills"
