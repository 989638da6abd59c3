#!/usr/bin/env bash
# gpu_pack.sh TREE PACK VERSION: the programs of TREE, stripped, with the shared libraries they need into PACK and, to be sent, PACK.tar.xz
# (the programs hold the same kernels, so that it is a fifteenth of PACK); without the C library and without cuBLAS (600 MB, which
# machines with a GPU have: scripts/gpu_check.sh finds it).
set -euo pipefail
tree=$1 pack=$2 version=$3
rm -rf "$pack.new"
mkdir -p "$pack.new/lib"
for program in device-tests model-device-tests lightmoe-bench lightmoe demo-generate_data; do
  strip -o "$pack.new/$program" "$tree/$program"
  ldd "$tree/$program" | awk '$3 ~ /^\// { print $3 }' | grep -vE '/(libc|libm|libdl|libpthread|librt|libcublas|libcublasLt)\.so' |
    while read -r library; do cp -nL "$library" "$pack.new/lib/"; done
done
echo "$version" > "$pack.new/version"
rm -rf "$pack"
mv "$pack.new" "$pack"
tar -C "$(dirname "$pack")" -cf - "$(basename "$pack")" | xz -T0 --lzma2=preset=3,dict=256MiB > "$pack.tar.xz.new"
mv "$pack.tar.xz.new" "$pack.tar.xz"
echo "gpu-build: $pack holds $(du -sm "$pack" | cut -f1) MB, $pack.tar.xz $(du -m "$pack.tar.xz" | cut -f1) MB"
