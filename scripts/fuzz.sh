#!/bin/sh
# Runs fuzzers (built by `make fuzz`) for a number of seconds each: fuzz.sh SECONDS FUZZER...
# Seeds: the files a target names on a "// seeds:" line, then what earlier runs found (build/fuzz-corpus). A crash, a leak, a hang of
# 10 s or 512 MB of memory fails; the input that did it is named.
set -eu
cd "$(dirname "$0")/.."
seconds=$1
shift
failed=0
for fuzzer in "$@"; do
  name=$(basename "$fuzzer")
  corpus=build/fuzz-corpus/$name seeds=build/fuzz-seeds/$name log=build/fuzz-corpus/$name.log
  rm -rf "$seeds"
  mkdir -p "$corpus" "$seeds"
  number=0
  for seed in $(sed -n 's|^// seeds: ||p' "tests/fuzz/$name.cpp"); do
    [ -f "$seed" ] || continue
    number=$((number + 1))
    cp "$seed" "$seeds/$number"
  done
  if OMP_NUM_THREADS=1 "$fuzzer" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=512 -close_fd_mask=1 \
    -artifact_prefix="$corpus.failed-" -print_final_stats=1 "$corpus" "$seeds" >"$log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    covered=$(grep -o 'cov: [0-9]*' "$log" | tail -1)
    echo "fuzz: $name ok, ${runs:-0} runs, $number seeds, $covered"
  else
    echo "fuzz: $name FAILED:" >&2
    tail -25 "$log" >&2
    failed=1
  fi
done
exit $failed
