// All kernels of one capability, each file building on those before it.

// clang-format off
#include "vector.h"
#include "gemm_float.h"
#include "gemm_bfloat16.h"
#include "gemm_amx.h"
#include "linear.h"
#include "mutual.h"
#include "trunk_forward.h"
#include "trunk_backward.h"
#include "weight_gradient.h"
// clang-format on

template <typename scalar_t>
constexpr TrunkKernels<scalar_t> kTrunkKernels = {
    {std::is_same_v<scalar_t, float> && (SAML_HAS_BFLOAT16_DOT != 0 || SAML_HAS_TILES != 0), kHasTiles<scalar_t>,
     kHasTiles<scalar_t>},
    kHasTiles<scalar_t> ? 32 : 12,
    kGradientItemRows<scalar_t>,
    &panels_size<scalar_t>,
    &bfloat16_panels_size<scalar_t>,
    &transposed_panels_size<scalar_t>,
    &lay_out<scalar_t>,
    &forward_scratch<scalar_t>,
    &forward_tile<scalar_t>,
    &backward_scratch<scalar_t>,
    &backward_tile<scalar_t>,
    &mutual_forward_tile<scalar_t>,
    &mutual_backward_tile<scalar_t>,
    &gradient_scratch<scalar_t>,
    &gradient_item<scalar_t>};
