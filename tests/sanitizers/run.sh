#!/usr/bin/env bash
# Builds the CPU kernels with GCC's sanitizers and runs those of all instruction sets, AVX-512 and AMX emulated.
#
# Address and UndefinedBehavior: a driver that calls every kernel in memory that ends where it should, then the
# extension in Python, where all memory is fresh and filled with NaN (tests of kept memory ask for that themselves; none
# forks, as a child may wait for ever for a lock of the sanitizer's own). Thread: the driver, on threads the sanitizer
# knows (OpenMP's it does not). Needs g++ with libasan, libubsan and libtsan. Environment: PYTHON (default .venv/bin/python),
# CXX (default g++).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
sources=$root/csrc
python=${PYTHON:-$root/.venv/bin/python}
cxx=${CXX:-g++}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

memory="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fPIC"
threads="-O2 -fsanitize=thread"
common="-std=c++20 -g1 -Wall -Wextra -Wno-psabi -include sanitizer/asan_interface.h"

# A copy, whose scratch memory has fences and whose kernels all run here.
cp -r "$sources" "$stage/csrc"
cat "$root/tests/sanitizers/fences.h" >>"$stage/csrc/cpu/kernels/tile.h"
"$root/tests/emulation/prepare.sh" "$stage/csrc"
kernels=$(cd "$stage/csrc" && echo cpu/capability_*.cpp)
driver="cpu/dispatch.cpp $root/tests/sanitizers/driver.cpp"

torch=$("$python" - <<'END'
import torch
from torch.utils import cpp_extension
print(*(f"-isystem {path}" for path in cpp_extension.include_paths()), end=" ")
print("-DSAML_KERNELS_TORCH_VERSION='\"sanitized\"' -DSAML_KERNELS_CUDA_OMITTED='\"sanitized\"'", end=" ")
print(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)} -fopenmp")
END
)
release=$("$python" -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')
library_path=$("$python" -c 'from torch.utils import cpp_extension; print(cpp_extension.library_paths()[0])')

# One command a line, as many at a time as there are cores.
mkdir "$stage/memory" "$stage/threads" "$stage/plain"
compile() { # folder, flags, files
  local folder=$1 flags=$2 file
  shift 2
  for file in "$@"; do
    echo "cd $stage/csrc && $cxx $common $flags -c $file -o $stage/$folder/$(basename "$file" .cpp).o"
  done
}
{
  compile memory "$memory $torch" ops.cpp cpu/trunk.cpp cpu/grouping.cpp
  compile memory "$memory -Icpu" $kernels $driver
  compile threads "$threads -Icpu" $kernels $driver
  compile plain "-fPIC -O3 -mavx2 -mfma -mf16c" cpu/products.cpp
} | tr '\n' '\0' | xargs -0 -P "$(nproc)" -I{} bash -c '{}'

cd "$stage"
$cxx $memory memory/capability_*.o memory/dispatch.o memory/driver.o plain/products.o -o memory/driver -pthread
$cxx $threads threads/capability_*.o threads/dispatch.o threads/driver.o plain/products.o -o threads/driver -pthread
cp -r "$root/saml_kernels" package && rm -f package/*.so
mkdir python && mv package python/saml_kernels
$cxx -shared $memory -fopenmp memory/ops.o memory/trunk.o memory/grouping.o memory/dispatch.o memory/capability_*.o \
  plain/products.o -L"$library_path" -lc10 -ltorch_cpu -ltorch -o python/saml_kernels/_ops.torch$release.so

# One process an instruction set, as many at a time as there are cores.
names=$(cd "$root/csrc/cpu" && printf '%s\n' capability_*.cpp | sed 's/capability_//; s/\.cpp//')
drive() { # what to run for each name
  printf '%s\n' $names | xargs -P "$(nproc)" -I{} "$@"
}

echo "== address, undefined behaviour: driver"
ASAN_OPTIONS=detect_leaks=0 drive memory/driver all {}

echo "== thread: driver"
# ThreadSanitizer cannot place its shadow where the kernel randomises addresses too widely.
fixed=()
setarch -R true 2>/dev/null && fixed=(setarch -R)
TSAN_OPTIONS=halt_on_error=1 drive "${fixed[@]}" threads/driver threads {}

echo "== address, undefined behaviour: extension"
cd "$root"
# PYTHONSAFEPATH: this checkout's own package must not come first.
preload="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)"
env LD_PRELOAD="$preload" SAML_KERNELS_KEEP_MEMORY=0 PYTHONPATH="$stage/python" PYTHONSAFEPATH=1 \
  OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 \
  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
  "$python" -m pytest -q -n "$(nproc)" -p no:cacheprovider -k "not compile and not forks and (not vnni or int8)" \
  tests/kernels/test_cpp_*.py tests/kernels/test_backend_choice.py tests/kernels/test_extension.py \
  tests/kernels/test_operators.py tests/kernels/test_grouping.py
