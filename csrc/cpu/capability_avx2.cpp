// The trunk's kernels for AVX2, FMA and F16C.

#define SAML_CAPABILITY kAvx2
#define SAML_CAPABILITY_NAME "avx2"
#define SAML_TARGET "avx2,fma,f16c"
#define SAML_VECTOR_BYTES 32
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_INT8_DOT 0
#define SAML_HAS_TILES 0
#define SAML_DOUBLES kAvx2Doubles
#define SAML_HAS_OWN_DOUBLES 1
#include "capability_frame.h"
