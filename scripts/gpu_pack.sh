#!/usr/bin/env bash
# gpu_pack.sh TREE PACK VERSION: the programs of TREE, stripped, with the shared libraries they need (the C library apart), into PACK.
set -euo pipefail
tree=$1 pack=$2 version=$3
rm -rf "$pack.new"
mkdir -p "$pack.new/lib"
for program in device-tests model-device-tests lightmoe-bench lightmoe; do
  strip -o "$pack.new/$program" "$tree/$program"
  ldd "$tree/$program" | awk '$3 ~ /^\// { print $3 }' | grep -vE '/(libc|libm|libdl|libpthread|librt)\.so' |
    while read -r library; do cp -nL "$library" "$pack.new/lib/"; done
done
echo "$version" > "$pack.new/version"
rm -rf "$pack"
mv "$pack.new" "$pack"
echo "gpu-build: $pack holds $(du -sm "$pack" | cut -f1) MB"
