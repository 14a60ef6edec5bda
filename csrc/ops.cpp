// Schemas of the operations, and the pybind11 module that tells how this extension was built.

#include <torch/library.h>

// The torch headers carry pybind11.
#include <pybind11/pybind11.h>

#include "activation.h"
#include "cpu/dispatch.h"
#include "grouping.h"
#include "operator.h"
#include "trunk_spec.h"

namespace saml_kernels {

void check_group_by_scenario(const at::Tensor& scenario, int64_t num_scenarios) {
  TORCH_CHECK_TYPE(scenario.scalar_type() == at::kInt || scenario.scalar_type() == at::kLong,
                   "scenario must be int32 or int64, got ", scenario.scalar_type());
  TORCH_CHECK_VALUE(scenario.dim() == 1, "scenario must have shape (B,), got ", scenario.sizes());
  TORCH_CHECK_VALUE(num_scenarios >= 1, "num_scenarios must be at least 1, got ", num_scenarios);
}

void check_num_counters(int64_t num_counters) {
  TORCH_CHECK_VALUE(num_counters >= 0, "num_counters must not be negative, got ", num_counters);
}

namespace {

template <typename Rows, typename Column>
pybind11::list list_of(const Rows& rows, Column column) {
  pybind11::list list;
  for (const auto& row : rows) {
    list.append(column(row));
  }
  return list;
}

}  // namespace
}  // namespace saml_kernels

TORCH_LIBRARY(saml_kernels, library) {
  using namespace saml_kernels;
  library.def(
      "group_by_scenario(Tensor scenario, int num_scenarios) -> (Tensor permutation, Tensor inverse, Tensor offsets)");
  library.def(
      "group_by_scenario_and_clear(Tensor scenario, int num_scenarios, int num_counters) -> "
      "(Tensor permutation, Tensor offsets, Tensor counters)");
  library.def("keep_layouts(bool keep) -> ()", &keep_layouts);
  library.def(schema<&trunk_forward_cpu>("trunk_forward").c_str());
  library.def(schema<&trunk_backward_cpu>("trunk_backward").c_str());
  library.def(schema<&mutual_forward_cpu>("mutual_forward").c_str());
  library.def(schema<&mutual_backward_cpu>("mutual_backward").c_str());
  library.def(schema<&experts_forward_cpu>("experts_forward").c_str());
  library.def(schema<&experts_backward_cpu>("experts_backward").c_str());
}

TORCH_LIBRARY_IMPL(saml_kernels, CPU, library) {
  using namespace saml_kernels;
  library.impl("group_by_scenario", &group_by_scenario_cpu);
  library.impl("group_by_scenario_and_clear", &group_by_scenario_and_clear_cpu);
  library.impl("trunk_forward", boxed<&trunk_forward_cpu>());
  library.impl("trunk_backward", boxed<&trunk_backward_cpu>());
  library.impl("mutual_forward", boxed<&mutual_forward_cpu>());
  library.impl("mutual_backward", boxed<&mutual_backward_cpu>());
  library.impl("experts_forward", boxed<&experts_forward_cpu>());
  library.impl("experts_backward", boxed<&experts_backward_cpu>());
}

PYBIND11_MODULE(_C, module) {
  using namespace saml_kernels;
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
        info["cpu_capabilities"] = list_of(supported_capabilities(), [](const Capability* row) { return row->name; });
        return info;
      },
      "How this extension was built: torch, compiler, C++ standard, CUDA version or why CUDA was left out.");
  module.def(
      "activations", [] { return list_of(kActivations, [](const ActivationRow& row) { return row.name; }); },
      "Names of the activations, at the numbers by which the operators take them.");
  module.def(
      "activations_need_preact",
      [] { return list_of(kActivations, [](const ActivationRow& row) { return row.needs_preact; }); },
      "For each of them: whether its derivative reads the pre-activation.");
  module.def(
      "scores", [] { return list_of(kScores, [](const char* name) { return name; }); },
      "Names of the scores, at the numbers by which the operators take them.");
}
