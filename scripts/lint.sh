#!/bin/sh
# The architecture as greps: who may include whom, where CUDA, asm and launches may stand, file budgets.
# Prints one line per finding; exits 1 on an error, 0 with warnings.
set -u
cd "$(dirname "$0")/.."
errors=0
error() { echo "lint: $*" >&2; errors=$((errors + 1)); }

# Five floors: a folder includes itself and the folders listed.
floor() {
  folder=$1; shift
  allowed=$(echo "$folder $*" | tr ' ' '|')
  bad=$(grep -rnE '^#include "(runtime|kernels|autograd|loaders|model|compress|cli|demo|bench|tests)/' "$folder" 2>/dev/null |
    grep -vE "#include \"($allowed)/")
  [ -z "$bad" ] || error "$folder may include $* only:
$bad"
}
floor runtime
floor kernels runtime
floor autograd runtime kernels
floor loaders runtime
floor model runtime kernels autograd loaders
floor compress runtime kernels autograd loaders model
floor cli runtime kernels autograd loaders model compress
floor demo runtime kernels autograd loaders model compress

only() { # pattern, allowed file regex, what
  bad=$(grep -rnE "$1" --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' \
    runtime kernels autograd loaders model compress cli bench demo 2>/dev/null | grep -vE "^($2):")
  [ -z "$bad" ] || error "$3:
$bad"
}
only '<<<' 'kernels/device/simt\.h|kernels/plugin/example/.*' 'kernel launches stand in kernels/device/simt.h only'
only '(^|[^_a-z])asm( volatile)?\(' 'kernels/device/ptx[a-z_]*\.h|kernels/device/simulator/fiber\.cpp' 'asm stands in kernels/device/ptx*.h only (and in the switch of stacks)'
only '#include <cu[a-z_]*\.h>' 'kernels/device/simt\.h|runtime/cuda[a-z_]*\.(h|cpp)|kernels/[a-z_]*(cublas|cub|nccl)[a-z_]*\.cu|kernels/plugin/example/.*' 'CUDA headers enter by two doors'
only '#include <cblas\.h>' 'kernels/gemm_blas\.cpp' 'BLAS enters by kernels/gemm_blas.cpp'
only '(^|[^_a-zA-Z])(rand|srand)\(|std::random_device|std::mt19937' 'none' 'random numbers come from runtime/philox.h'

for file in $(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null); do
  lines=$(wc -l <"$file")
  [ "$lines" -le 400 ] || echo "lint: warning: $file has $lines lines (budget 400)" >&2
done
[ "$errors" -eq 0 ] || { echo "lint: $errors errors" >&2; exit 1; }
echo "lint: ok"
