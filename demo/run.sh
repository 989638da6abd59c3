#!/bin/sh
# The demo, from data to report: `make demo`, or `make demo SHORT=1` for two tasks and few steps.
# Everything it writes is under out/; stages that are complete are not done again.
set -eu
cd "$(dirname "$0")/.."
make --no-print-directory build/demo-generate_data
[ -f out/demo-data/.complete ] || { build/demo-generate_data out/demo-data && touch out/demo-data/.complete; }
if [ -n "${SHORT:-}" ]; then
  build/lightmoe run recipes/demo.toml --short --jobs 2
else
  build/lightmoe run recipes/demo.toml --jobs 2
fi
