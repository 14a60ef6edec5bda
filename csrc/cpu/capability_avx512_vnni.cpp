// The trunk's kernels for AVX-512 with dot products of int8.

#define SAML_CAPABILITY kAvx512Vnni
#define SAML_CAPABILITY_NAME "avx512_vnni"
#define SAML_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"
#define SAML_VECTOR_BYTES 64
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_INT8_DOT 1
#define SAML_HAS_TILES 0
#define SAML_DOUBLES kAvx512Doubles
#define SAML_HAS_OWN_DOUBLES 0
#include "capability_frame.h"
