#!/bin/sh
# Installs the Debian packages named as arguments that are missing, as root or through sudo.
# Says in one line what it installs; says and does nothing when all are there.
set -eu
command -v dpkg-query >/dev/null 2>&1 || { echo "setup: not a Debian system; these must be present: $*" >&2; exit 0; }
missing=""
for package in "$@"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
as_root=""
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || { echo "setup: need root or sudo to install:$missing" >&2; exit 1; }
  as_root="sudo"
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ $as_root apt-get install -y --no-install-recommends $missing ||
  { $as_root apt-get update && $as_root apt-get install -y --no-install-recommends $missing; }; } >"$log" 2>&1 ||
  { echo "setup: apt-get failed:" >&2; tail -5 "$log" >&2; exit 1; }
