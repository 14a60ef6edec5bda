// The trunk's kernels for AMX: tiles of bfloat16 and int8 products, beside AVX-512 with bfloat16 dot products.

#define SAML_CAPABILITY kAmx
#define SAML_CAPABILITY_NAME "amx"
#define SAML_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,avx2,fma"
#define SAML_VECTOR_BYTES 64
#define SAML_HAS_BFLOAT16_DOT 1
#define SAML_HAS_INT8_DOT 1
#define SAML_HAS_TILES 1
#define SAML_DOUBLES kAvx512Doubles
#define SAML_HAS_OWN_DOUBLES 0
#include "capability_frame.h"
