// All kernels of one capability, each file building on those before it.

// clang-format off
#include "vector.h"
#include "gemm.h"
#include "gemm_bfloat16.h"
#include "gemm_tiles.h"
#include "products.h"
#include "trunk_kernels.h"
#include "trunk_backward.h"
// clang-format on
