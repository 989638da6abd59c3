#!/bin/sh
# Compiles kernels for sm_80 and sm_90a with nvcc, as many files at a time as there are cores, warnings as errors; fails on register
# spills, on local memory, on ptxas's repair messages (C75xx: a wgmma pipeline that the assembler had to serialise), and when registers,
# static shared memory, stack or the instructions that matter are not those of kernels/budget/registers.txt, so that a change shows.
# usage: check_ptxas.sh NVCC FLAGS FILE.cu...      BUDGET=update writes the budget of these files instead of comparing
set -eu
budget=kernels/budget/registers.txt
if [ "$1" = --one ]; then  # NVCC FLAGS FILE, called by the line further down
  nvcc=$2 flags=$3 source=$4
  name=$(basename "$source" .cu)
  out=build/cuda/$name
  rm -rf "$out.keep"
  mkdir -p "$out.keep"
  # shellcheck disable=SC2086
  "$nvcc" $flags -I. -Xptxas -v,-warn-spills -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    --keep --keep-dir "$out.keep" -c "$source" -o "$out.o" >"$out.log" 2>&1 ||
    { echo "cuda: $source does not compile:" >&2; cat "$out.log" >&2; exit 1; }
  if grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]' "$out.log" >&2; then
    echo "cuda: $source: spills or repaired wgmma (above)" >&2
    exit 1
  fi
  build/cuda/cubin_report "$name.cu" "$out.log" "$out.keep"/*.cubin >"$out.lines" || exit 1
  rm -rf "$out.keep"
  exit 0
fi
nvcc=$1 flags=$2
shift 2
mkdir -p build/cuda
${CXX:-g++} -std=c++20 -O1 scripts/cubin_report.cpp -o build/cuda/cubin_report
printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} "$0" --one "$nvcc" "$flags" {} || exit 1
echo "cuda: $# files compiled for sm_80 and sm_90a, no spills"

version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
for source in "$@"; do cat "build/cuda/$(basename "$source" .cu).lines"; done | LC_ALL=C sort >build/cuda/now
for source in "$@"; do echo "^$(basename "$source" .cu)\\.cu "; done >build/cuda/files
if [ "${BUDGET:-check}" = update ]; then
  {
    echo "# Registers, static shared memory, stack and instructions of every kernel: scripts/check_ptxas.sh, make cuda-budget. nvcc $version"
    {
      cat build/cuda/now
      if [ -f $budget ]; then grep -v '^#' $budget | grep -vf build/cuda/files | awk 'system("test -f kernels/" $1) == 0'; fi
    } | LC_ALL=C sort
  } >build/cuda/budget
  mv build/cuda/budget $budget
  echo "cuda: $budget holds $(grep -vc '^#' $budget) kernels"
  exit 0
fi
if [ "$(sed -n '1s/.* //p' $budget)" != "$version" ]; then
  echo "cuda: nvcc $version, $budget is of another: not compared"
  exit 0
fi
grep -v '^#' $budget | grep -f build/cuda/files >build/cuda/expected || true
if ! diff build/cuda/expected build/cuda/now >build/cuda/difference; then
  cat build/cuda/difference >&2
  echo "cuda: kernels are not as in $budget (above: < budget, > now); 'make cuda-budget' accepts what they are" >&2
  exit 1
fi
echo "cuda: $(wc -l <build/cuda/now) kernels as in $budget"
