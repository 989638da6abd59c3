#!/usr/bin/env bash
# Runs a GoogleTest program as TEST_SHARDS processes, each with its share of the tests, as many at a time as there are cores:
#   run_tests.sh PROGRAM [ARGUMENTS]
# Default: four for each core, so that the one with the longest tests does not end long after the others.
# The cores are divided among them: many short parallel regions in more threads than cores took two to three times as long. Tests of
# what threads may change set their number themselves. Lines are marked with their process; the last line is the sum,
# "N passed, N failed, N skipped". A process that ends without its own summary counts as one more failure, and a run of no test fails.
set -euo pipefail
cores=$(nproc) shards=${TEST_SHARDS:-$((4 * $(nproc)))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > shards ? cores / shards : 1))}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

run() { # shard, program, arguments
  local status=0
  GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$1 "${@:2}" 2>&1 | tee "$logs/$1" | sed -u "s/^/$1| /" || status=$?
  echo "$status" > "$logs/$1.status"
}
for ((i = 0; i < shards; i++)); do
  ((i < cores)) || wait -n
  run "$i" "$@" &
done
wait

passed=0 failed=0 skipped=0
for ((i = 0; i < shards; i++)); do
  log=$logs/$i status=$(cat "$logs/$i.status")
  summary() { local n; n=$(sed -nE "s/^\[  $1 +\] ([0-9]+) tests?[,.]?.*/\1/p" "$log" | tail -1); echo "${n:-0}"; }
  wrong=$(sed -nE 's/^\[  FAILED  \] ([^ ,]+).* \([0-9]+ ms\)$/\1/p' "$log")
  [ -z "$wrong" ] || sed 's/^/failed: /' <<< "$wrong"
  passed=$((passed + $(summary PASSED))) skipped=$((skipped + $(summary SKIPPED))) failed=$((failed + $(wc -w <<< "$wrong")))
  if ! grep -q '^\[=.*ran\. (' "$log" || { [ "$status" != 0 ] && [ -z "$wrong" ]; }; then
    echo "failed: process $i ended with status $status$(sed -nE 's/^\[ RUN      \] (.*)/ in \1/p' "$log" | tail -1)"
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ $((passed + skipped)) != 0 ]
