// Schemas of the operations, and operators without tensors that tell how this library was built. It has no symbol of
// Python's, so that a C++ process can load it.

#include <ATen/core/List.h>
#include <torch/library.h>

#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

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

// torch, compiler, C++ standard, CUDA version or why CUDA was left out, and the instruction sets this machine can run.
using BuildInfo = std::tuple<std::string, std::string, int64_t, std::optional<std::string>, std::optional<std::string>,
                             std::vector<std::string>>;

BuildInfo build_info() {
#ifdef SAML_KERNELS_CUDA
  const std::optional<std::string> cuda = SAML_KERNELS_CUDA, cuda_omitted;
#else
  const std::optional<std::string> cuda, cuda_omitted = SAML_KERNELS_CUDA_OMITTED;
#endif
  std::vector<std::string> capabilities;
  for (const Capability* row : supported_capabilities()) {
    capabilities.push_back(row->name);
  }
  return {SAML_KERNELS_TORCH_VERSION, __VERSION__, __cplusplus, cuda, cuda_omitted, capabilities};
}

std::vector<std::string> activations() {
  std::vector<std::string> names;
  for (const ActivationRow& row : kActivations) {
    names.push_back(row.name);
  }
  return names;
}

c10::List<bool> activations_need_preact() {
  c10::List<bool> needs;
  for (const ActivationRow& row : kActivations) {
    needs.push_back(row.needs_preact);
  }
  return needs;
}

std::vector<std::string> scores() { return {std::begin(kScores), std::end(kScores)}; }

}  // namespace
}  // namespace saml_kernels

TORCH_LIBRARY(saml_kernels, library) {
  using namespace saml_kernels;
  library.def(
      "build_info() -> (str torch, str compiler, int cpp_standard, str? cuda, str? cuda_omitted, "
      "str[] cpu_capabilities)",
      &build_info);
  // Names at the numbers by which the operators take them, and whether an activation's derivative reads its argument.
  library.def("activations() -> str[]", &activations);
  library.def("activations_need_preact() -> bool[]", &activations_need_preact);
  library.def("scores() -> str[]", &scores);
  library.def(
      "group_by_scenario(Tensor scenario, int num_scenarios) -> (Tensor permutation, Tensor inverse, Tensor offsets)");
  library.def(
      "group_by_scenario_and_clear(Tensor scenario, int num_scenarios, int num_counters) -> "
      "(Tensor permutation, Tensor offsets, Tensor counters)");
  library.def("keep_layouts(bool keep) -> ()", &keep_layouts);
  library.def("release_memory() -> int", &release_memory);
  library.def(schema<&trunk_forward_cpu>("trunk_forward").c_str());
  library.def(schema<&trunk_backward_cpu>("trunk_backward").c_str());
  library.def(schema<&trunk_weight_gradients_cpu>("trunk_weight_gradients").c_str());
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
  library.impl("trunk_weight_gradients", boxed<&trunk_weight_gradients_cpu>());
  library.impl("mutual_forward", boxed<&mutual_forward_cpu>());
  library.impl("mutual_backward", boxed<&mutual_backward_cpu>());
  library.impl("experts_forward", boxed<&experts_forward_cpu>());
  library.impl("experts_backward", boxed<&experts_backward_cpu>());
}
