#!/bin/sh
# make bench: measures and writes build/bench/<part>.json (Google Benchmark's JSON, with commit and processor in its context).
#   REPETITIONS=5   FILTER=regex for one run of your own   FULL=1 adds the 6.9 B shape (needs 16 GB of memory)
set -eu
cd "$(dirname "$0")/.."
repetitions=${REPETITIONS:-3}
mkdir -p build/bench
part() { # name, filter
  echo "== $1"
  build/lightmoe-bench --benchmark_filter="$2" --benchmark_repetitions="$repetitions" \
    --benchmark_report_aggregates_only=true --benchmark_counters_tabular=true \
    --benchmark_out="build/bench/$1.json" --benchmark_out_format=json
}
if [ -n "${FILTER:-}" ]; then
  part custom "$FILTER"
  exit 0
fi
part ceilings '^ceiling/'
part ops '^op/'
part gemm '^gemm/'
part model-tiny '^model/tiny/'
part model-mid '^model/mid/'
part slots-mid '^slots/mid/'
part scaling '^scaling/'
[ -z "${FULL:-}" ] || part model-olmoe-1b-7b '^model/olmoe-1b-7b/'
echo "written: build/bench/*.json"
