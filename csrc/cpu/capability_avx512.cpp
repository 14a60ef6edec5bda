// The trunk's kernels for AVX-512.

#include "trunk.h"

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#define SAML_VECTOR_BYTES 64
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_TILES 0

// Only this project's code follows: inline functions of the library, shared with the rest of the program by the
// linker, must not be compiled for an instruction set that the machine may lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace saml_kernels {
namespace {

#include "kernels/capability.h"

}  // namespace

const Capability kAvx512 = {"avx512", kTrunkKernels<float>, kTrunkKernels<double>};

}  // namespace saml_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
