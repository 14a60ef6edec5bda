// The trunk's kernels for any processor.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "trunk.h"

#define SAML_VECTOR_BYTES 16
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_TILES 0

namespace saml_kernels {
namespace {

#include "kernels/capability.h"

}  // namespace

const Capability kBaseline = {"baseline", kTrunkKernels<float>, kTrunkKernels<double>};

}  // namespace saml_kernels
