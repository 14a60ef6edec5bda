// The trunk's kernels for any processor.

#define SAML_CAPABILITY kBaseline
#define SAML_CAPABILITY_NAME "baseline"
#define SAML_VECTOR_BYTES 16
#define SAML_HAS_BFLOAT16_DOT 0
#define SAML_HAS_INT8_DOT 0
#define SAML_HAS_TILES 0
#define SAML_DOUBLES kBaselineDoubles
#define SAML_HAS_OWN_DOUBLES 1
#include "capability_frame.h"
