// The trunk's kernels for AVX-512.

#define SAML_CAPABILITY kAvx512
#define SAML_CAPABILITY_NAME "avx512"
#define SAML_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define SAML_VECTOR_BYTES 64
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_INT8_DOT 0
#define SAML_HAS_TILES 0
#define SAML_DOUBLES kAvx512Doubles
#define SAML_HAS_OWN_DOUBLES 1
#include "capability_frame.h"
