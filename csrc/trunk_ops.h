// The trunk's operations as C++ functions over tensors; ops.cpp gives them their schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace saml_kernels {

// Everything forward reads, and backward reads again. float or double, contiguous. Rows of x_local (B, D_l) or
// (B, M, D_l) and x_global (B, D_g) are sorted by scenario.
struct TrunkInputs {
  at::Tensor x_local;
  at::Tensor x_global;
  at::Tensor permutation;
  at::Tensor offsets;
  std::vector<at::Tensor> branch_weights;
  std::vector<at::Tensor> branch_biases;
  std::vector<at::Tensor> aux_weights;  // empty: no auxiliary network
  std::vector<at::Tensor> aux_biases;
  std::vector<at::Tensor> gate_weights;  // one for every entry of mutual_layers
  std::vector<at::Tensor> gate_biases;
  std::vector<int64_t> mutual_layers;  // counted from 0
  std::vector<int64_t> activations;    // one a layer, enum Activation
  int64_t score;                       // enum Score
  double temperature;
  bool own_bfloat16;
  bool foreign_bfloat16;
};

struct TrunkForward {
  at::Tensor own;  // (B, d_L), or of all branches (B, M, d_L)
  at::Tensor aux;
  std::vector<at::Tensor> scores;  // a mutual layer's own rows of α, rows sorted
  std::vector<at::Tensor> kept;    // for backward, in its order
};

struct TrunkBackward {
  at::Tensor x_local;
  at::Tensor x_global;
  std::vector<at::Tensor> branch_weights;
  std::vector<at::Tensor> branch_biases;
  std::vector<at::Tensor> aux_weights;
  std::vector<at::Tensor> aux_biases;
  std::vector<at::Tensor> gate_weights;
  std::vector<at::Tensor> gate_biases;
};

// The mutual unit alone, on streams (B, M, d) with rows sorted by scenario.
struct MutualInputs {
  at::Tensor streams;
  at::Tensor permutation;
  at::Tensor offsets;
  at::Tensor gate_weight;
  at::Tensor gate_bias;
  int64_t score;
  double temperature;
  bool bfloat16;
};

struct MutualForward {
  at::Tensor mutual;  // M_t, in the caller's order
  at::Tensor scores;  // own rows of α, rows sorted as all that follows
  at::Tensor own;     // V_t
  at::Tensor gate;
};

struct MutualBackward {
  at::Tensor streams;  // in the caller's order, zero in foreign streams
  at::Tensor gate_weight;
  at::Tensor gate_bias;
};

MutualForward mutual_forward_cpu(const MutualInputs& inputs);
MutualBackward mutual_backward_cpu(const MutualInputs& inputs, const at::Tensor& gradient, const MutualForward& kept);

// all_branches: every branch of every sample, for which there must be no mutual layer; backward is that of the own
// branch either way.
TrunkForward trunk_forward_cpu(const TrunkInputs& inputs, bool keep, bool recompute, bool all_branches);

// Cotangents and the inputs' gradients stand in the caller's row order. An input's gradient that is not needed is
// empty.
TrunkBackward trunk_backward_cpu(const TrunkInputs& inputs, const at::Tensor& grad_own, const at::Tensor& grad_aux,
                                 at::TensorList scores, at::TensorList kept, bool recompute, bool need_local,
                                 bool need_global);

// Instruction sets this machine can run, best first.
std::vector<std::string> cpu_capabilities();

}  // namespace saml_kernels
