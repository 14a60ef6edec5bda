// Which instruction sets this machine can run.
#pragma once

#include <vector>

#include "trunk.h"

namespace saml_kernels {

// Best first; the last one is kBaseline.
const std::vector<const Capability*>& supported_capabilities();

}  // namespace saml_kernels
