// Schemas of the operations, and the pybind11 module that tells how this extension was built.

#include <torch/library.h>

// The torch headers carry pybind11.
#include <pybind11/pybind11.h>

#include "grouping.h"
#include "trunk_ops.h"

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

TrunkInputs trunk_inputs(const at::Tensor& x_local, const at::Tensor& x_global, const at::Tensor& permutation,
                         const at::Tensor& offsets, at::TensorList branch_weights, at::TensorList branch_biases,
                         at::TensorList aux_weights, at::TensorList aux_biases, at::TensorList gate_weights,
                         at::TensorList gate_biases, at::IntArrayRef mutual_layers, at::IntArrayRef activations,
                         int64_t score, double temperature, bool own_bfloat16, bool foreign_bfloat16) {
  return {x_local,
          x_global,
          permutation,
          offsets,
          branch_weights.vec(),
          branch_biases.vec(),
          aux_weights.vec(),
          aux_biases.vec(),
          gate_weights.vec(),
          gate_biases.vec(),
          mutual_layers.vec(),
          activations.vec(),
          score,
          temperature,
          own_bfloat16,
          foreign_bfloat16};
}

using Tensors = std::vector<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, Tensors, Tensors> trunk_forward(
    const at::Tensor& x_local, const at::Tensor& x_global, const at::Tensor& permutation, const at::Tensor& offsets,
    at::TensorList branch_weights, at::TensorList branch_biases, at::TensorList aux_weights, at::TensorList aux_biases,
    at::TensorList gate_weights, at::TensorList gate_biases, at::IntArrayRef mutual_layers, at::IntArrayRef activations,
    int64_t score, double temperature, bool own_bfloat16, bool foreign_bfloat16, bool keep, bool recompute,
    bool all_branches) {
  TORCH_CHECK_VALUE(!all_branches || mutual_layers.empty(), "all_branches excludes mutual layers");
  TrunkForward result =
      trunk_forward_cpu(trunk_inputs(x_local, x_global, permutation, offsets, branch_weights, branch_biases,
                                     aux_weights, aux_biases, gate_weights, gate_biases, mutual_layers, activations,
                                     score, temperature, own_bfloat16, foreign_bfloat16),
                        keep, recompute, all_branches);
  return {result.own, result.aux, result.scores, result.kept};
}

std::tuple<at::Tensor, at::Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> trunk_backward(
    const at::Tensor& grad_own, const at::Tensor& grad_aux, at::TensorList scores, at::TensorList kept,
    const at::Tensor& x_local, const at::Tensor& x_global, const at::Tensor& permutation, const at::Tensor& offsets,
    at::TensorList branch_weights, at::TensorList branch_biases, at::TensorList aux_weights, at::TensorList aux_biases,
    at::TensorList gate_weights, at::TensorList gate_biases, at::IntArrayRef mutual_layers, at::IntArrayRef activations,
    int64_t score, double temperature, bool own_bfloat16, bool foreign_bfloat16, bool recompute, bool need_local,
    bool need_global) {
  TrunkBackward result =
      trunk_backward_cpu(trunk_inputs(x_local, x_global, permutation, offsets, branch_weights, branch_biases,
                                      aux_weights, aux_biases, gate_weights, gate_biases, mutual_layers, activations,
                                      score, temperature, own_bfloat16, foreign_bfloat16),
                         grad_own, grad_aux, scores, kept, recompute, need_local, need_global);
  return {result.x_local,     result.x_global,   result.branch_weights, result.branch_biases,
          result.aux_weights, result.aux_biases, result.gate_weights,   result.gate_biases};
}

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

FourTensors mutual_forward(const at::Tensor& streams, const at::Tensor& permutation, const at::Tensor& offsets,
                           const at::Tensor& gate_weight, const at::Tensor& gate_bias, int64_t score,
                           double temperature, bool bfloat16) {
  MutualForward result =
      mutual_forward_cpu({streams, permutation, offsets, gate_weight, gate_bias, score, temperature, bfloat16});
  return {result.mutual, result.scores, result.own, result.gate};
}

ThreeTensors mutual_backward(const at::Tensor& gradient, const at::Tensor& scores, const at::Tensor& own,
                             const at::Tensor& gate, const at::Tensor& streams, const at::Tensor& permutation,
                             const at::Tensor& offsets, const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                             int64_t score, double temperature, bool bfloat16) {
  MutualBackward result =
      mutual_backward_cpu({streams, permutation, offsets, gate_weight, gate_bias, score, temperature, bfloat16},
                          gradient, {at::Tensor(), scores, own, gate});
  return {result.streams, result.gate_weight, result.gate_bias};
}

}  // namespace
}  // namespace saml_kernels

TORCH_LIBRARY(saml_kernels, library) {
  library.def(
      "group_by_scenario(Tensor scenario, int num_scenarios) -> (Tensor permutation, Tensor inverse, Tensor offsets)");
  library.def(
      "group_by_scenario_and_clear(Tensor scenario, int num_scenarios, int num_counters) -> "
      "(Tensor permutation, Tensor inverse, Tensor offsets, Tensor counters)");
#define SAML_TRUNK_INPUTS                                                                                            \
  "Tensor x_local, Tensor x_global, Tensor permutation, Tensor offsets, Tensor[] branch_weights, "                   \
  "Tensor[] branch_biases, Tensor[] aux_weights, Tensor[] aux_biases, Tensor[] gate_weights, Tensor[] gate_biases, " \
  "int[] mutual_layers, int[] activations, int score, float temperature, bool own_bfloat16, bool foreign_bfloat16, "
  library.def(
      "trunk_forward(" SAML_TRUNK_INPUTS
      "bool keep, bool recompute, bool all_branches) -> (Tensor own, Tensor aux, Tensor[] scores, Tensor[] kept)");
  library.def("trunk_backward(Tensor grad_own, Tensor grad_aux, Tensor[] scores, Tensor[] kept, " SAML_TRUNK_INPUTS
              "bool recompute, bool need_local, bool need_global) -> (Tensor x_local, Tensor x_global, "
              "Tensor[] branch_weights, Tensor[] branch_biases, Tensor[] aux_weights, Tensor[] aux_biases, "
              "Tensor[] gate_weights, Tensor[] gate_biases)");
#define SAML_MUTUAL_INPUTS                                                                                \
  "Tensor streams, Tensor permutation, Tensor offsets, Tensor gate_weight, Tensor gate_bias, int score, " \
  "float temperature, bool bfloat16"
  library.def("mutual_forward(" SAML_MUTUAL_INPUTS ") -> (Tensor mutual, Tensor scores, Tensor own, Tensor gate)");
  library.def("mutual_backward(Tensor gradient, Tensor scores, Tensor own, Tensor gate, " SAML_MUTUAL_INPUTS
              ") -> (Tensor streams, Tensor gate_weight, Tensor gate_bias)");
}

TORCH_LIBRARY_IMPL(saml_kernels, CPU, library) {
  library.impl("group_by_scenario", &saml_kernels::group_by_scenario_cpu);
  library.impl("group_by_scenario_and_clear", &saml_kernels::group_by_scenario_and_clear_cpu);
  library.impl("trunk_forward", &saml_kernels::trunk_forward);
  library.impl("trunk_backward", &saml_kernels::trunk_backward);
  library.impl("mutual_forward", &saml_kernels::mutual_forward);
  library.impl("mutual_backward", &saml_kernels::mutual_backward);
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
        pybind11::list capabilities;
        for (const std::string& name : saml_kernels::cpu_capabilities()) {
          capabilities.append(name);
        }
        info["cpu_capabilities"] = capabilities;
        return info;
      },
      "How this extension was built: torch, compiler, C++ standard, CUDA version or why CUDA was left out.");
}
