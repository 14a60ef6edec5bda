// In place of csrc/cpu/dispatch.cpp, where the kernels are compiled with intrinsics.h: every instruction set runs.

#include "dispatch.h"

namespace saml_kernels {

const std::vector<const Capability*>& supported_capabilities() {
  static const std::vector<const Capability*> supported = {&kAmx,      &kAvx512Bf16, &kAvx512Vnni, &kAvx512,
                                                           &kAvx2Vnni, &kAvx2,       &kBaseline};
  return supported;
}

}  // namespace saml_kernels
