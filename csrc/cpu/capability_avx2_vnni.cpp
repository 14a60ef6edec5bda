// The trunk's kernels for AVX2, FMA and F16C with dot products of int8.

#define SAML_CAPABILITY kAvx2Vnni
#define SAML_CAPABILITY_NAME "avx2_vnni"
#define SAML_TARGET "avx2,fma,f16c,avxvnni"
#define SAML_VECTOR_BYTES 32
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_INT8_DOT 1
#define SAML_HAS_TILES 0
#define SAML_DOUBLES kAvx2Doubles
#define SAML_HAS_OWN_DOUBLES 0
#include "capability_frame.h"
