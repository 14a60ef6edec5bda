// What every capability file consists of: the kernels, compiled for one instruction set. The file that includes it
// defines
//
//     SAML_CAPABILITY         the name of its Capability
//     SAML_CAPABILITY_NAME    its name for users
//     SAML_TARGET             the instruction sets, as the compiler spells them; undefined: those of any processor
//     SAML_VECTOR_BYTES       the width of a vector
//     SAML_HAS_BFLOAT16_DOT   1: vectors multiply pairs of bfloat16
//     SAML_HAS_INT8_DOT       1: vectors sum products of four int8
//     SAML_HAS_TILES          1: there is a tile unit
//     SAML_DOUBLES            the name of its kernels for double
//     SAML_HAS_OWN_DOUBLES    1: they are made here

#include "trunk.h"

#if !defined(SAML_TARGET) || defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if SAML_VECTOR_BYTES > 16
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from a variable they leave uninitialised on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

// Only this project's code follows: inline functions of the library, shared with the rest of the program by the
// linker, must not be compiled for an instruction set that the machine may lack.
#ifdef SAML_TARGET
#define SAML_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SAML_PUSH_TARGET(target_) \
  SAML_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#else
#define SAML_PUSH_TARGET(target_) SAML_PRAGMA(GCC target(target_))
#endif
SAML_PUSH_TARGET(SAML_TARGET)
#endif

namespace saml_kernels {
namespace {

// Each builds on those before it.
// clang-format off
#include "kernels/vector.h"
#include "kernels/storage.h"
#include "kernels/tile.h"
#include "kernels/units.h"
#include "kernels/panels.h"
#include "kernels/gemm_float.h"
#include "kernels/gemm_bfloat16.h"
#include "kernels/gemm_amx.h"
#include "kernels/gemm_int8.h"
#include "kernels/weight_panels.h"
#include "kernels/linear.h"
#include "kernels/team.h"
#include "kernels/mutual.h"
#include "kernels/trunk_forward.h"
#include "kernels/trunk_backward.h"
#include "kernels/experts.h"
#include "kernels/weight_gradient.h"
// clang-format on

template <typename scalar_t>
constexpr TrunkKernels<scalar_t> kTrunkKernels = {
    .layouts = {.bfloat16 = kHasBfloat16Panels<scalar_t>, .float_parts = kHasTiles<scalar_t>},
    .row_multiples = kHasTiles<scalar_t> ? RowMultiples{kBlockSide, kBlockSide} : RowMultiples{kRegisterTileRows, 4},
    .gradient_item_rows = kGradientItemRows<scalar_t>,
    .least_gradient_item_rows = kLeastGradientItemRows<scalar_t>,
    .panels_size = &panels_size<scalar_t>,
    .transposed_float_panels_size = &transposed_float_panels_size<scalar_t>,
    .bfloat16_panels_size = &bfloat16_panels_size<scalar_t>,
    .transposed_panels_size = &transposed_panels_size<scalar_t>,
    .int8_panels_size = &int8_panels_size<scalar_t>,
    .lay_out = &lay_out<scalar_t>,
    .forward_scratch = &forward_scratch<scalar_t>,
    .forward_tile = &forward_tile<scalar_t>,
    .backward_scratch = &backward_scratch<scalar_t>,
    .begin_backward = &begin_backward<scalar_t>,
    .backward_tile = &backward_tile<scalar_t>,
    .mutual_forward_tile = &mutual_forward_tile<scalar_t>,
    .mutual_backward_tile = &mutual_backward_tile<scalar_t>,
    .experts_forward_scratch = &experts_forward_scratch<scalar_t>,
    .experts_forward_tile = &experts_forward_tile<scalar_t>,
    .experts_backward_scratch = &experts_backward_scratch<scalar_t>,
    .experts_backward_tile = &experts_backward_tile<scalar_t>,
    .gradient_scratch = &gradient_scratch<scalar_t>,
    .gradient_item = &gradient_item<scalar_t>,
};

}  // namespace

#if SAML_HAS_OWN_DOUBLES
const TrunkKernels<double> SAML_DOUBLES = kTrunkKernels<double>;
#endif

const Capability SAML_CAPABILITY = {SAML_CAPABILITY_NAME, kTrunkKernels<float>, &SAML_DOUBLES};

}  // namespace saml_kernels

#if defined(SAML_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif
