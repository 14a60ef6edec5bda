// Schemas of the operations, and the pybind11 module that tells how this extension was built.

#include <torch/library.h>

// The torch headers carry pybind11.
#include <pybind11/pybind11.h>

#include "grouping.h"

namespace saml_kernels {

void check_group_by_scenario(const at::Tensor& scenario, int64_t num_scenarios) {
  TORCH_CHECK_TYPE(scenario.scalar_type() == at::kInt || scenario.scalar_type() == at::kLong,
                   "scenario must be int32 or int64, got ", scenario.scalar_type());
  TORCH_CHECK_VALUE(scenario.dim() == 1, "scenario must have shape (B,), got ", scenario.sizes());
  TORCH_CHECK_VALUE(num_scenarios >= 1, "num_scenarios must be at least 1, got ", num_scenarios);
}

}  // namespace saml_kernels

TORCH_LIBRARY(saml_kernels, library) {
  library.def(
      "group_by_scenario(Tensor scenario, int num_scenarios) -> (Tensor permutation, Tensor inverse, Tensor offsets)");
}

TORCH_LIBRARY_IMPL(saml_kernels, CPU, library) {
  library.impl("group_by_scenario", &saml_kernels::group_by_scenario_cpu);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of saml_kernels; the operations are under torch.ops.saml_kernels.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = SAML_KERNELS_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
#ifdef SAML_KERNELS_CUDA
        info["cuda"] = SAML_KERNELS_CUDA;
        info["cuda_omitted"] = pybind11::none();
#else
        info["cuda"] = pybind11::none();
        info["cuda_omitted"] = SAML_KERNELS_CUDA_OMITTED;
#endif
        return info;
      },
      "How this extension was built: torch, compiler, C++ standard, CUDA version or why CUDA was left out.");
}
