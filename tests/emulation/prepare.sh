#!/usr/bin/env bash
# Makes a copy of csrc/ one whose kernels for AVX-512, dot products of int8 and AMX run on any x86-64 machine with AVX2
# (intrinsics.h), linked with cpu/products.cpp.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
copy=$1/cpu
cp "$here/intrinsics.h" "$here/dispatch.cpp" "$here/products.cpp" "$copy"
sed -i 's|<immintrin.h>|"intrinsics.h"|' "$copy/capability_frame.h"
grep -q '"intrinsics.h"' "$copy/capability_frame.h"
for name in avx2_vnni avx512 avx512_vnni avx512_bf16 amx; do
  sed -i 's|^#define SAML_TARGET .*|#define SAML_TARGET "avx2,fma,f16c"|' "$copy/capability_$name.cpp"
done
