// The trunk's operators: what each takes and gives back, and the functions that compute them on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"

namespace saml_kernels {

// Gives a struct the names of its fields, and the fields, in this order: that of an operator's schema.
#define SAML_FIELDS(...)                                              \
  static constexpr const char* field_names() { return #__VA_ARGS__; } \
  auto fields() { return std::tie(__VA_ARGS__); }

using Tensors = std::vector<at::Tensor>;

// The trunk and its batch, as both passes read them. Tensors are contiguous and float, or what float computes with,
// bfloat16 or float16; or all double. Rows stand in the caller's order.
struct TrunkSpec {
  at::Tensor x_local;                   // (B, D_l) or (B, M, D_l)
  at::Tensor x_global;                  // (B, D_g)
  at::Tensor permutation;               // (B,), the caller's row of every sorted one
  at::Tensor offsets;                   // (M + 1,), where the scenarios' rows begin
  Tensors branch_weights;               // W (M, d_{l-1} + a_l, d_l), one a layer
  Tensors branch_biases;                // (M, d_l)
  Tensors aux_weights;                  // Wa (a_{l-1}, a_l), one a layer; none: no auxiliary network
  Tensors aux_biases;                   // (a_l,)
  Tensors gate_weights;                 // U (M, d_l, d_l) or (M, d_l, 1), one for every entry of mutual_layers
  Tensors gate_biases;                  // (M, d_l) or (M, 1)
  Tensors shared_weights;               // (d_{l-1} + a_l, d_l), one a layer, or none; branches' weights are W_k ∘ that
  std::vector<int64_t> mutual_layers;   // counted from 0
  std::vector<Activation> activations;  // one a layer
  Score score;
  double temperature;
  bool own_bfloat16;          // products of own branches and auxiliary layers take bfloat16 factors
  Rounding foreign_rounding;  // of factors of foreign branches; bfloat16 where the own ones take it
  // (B, d_L), in the caller's order: own is γ sigmoid(Z_t^L) ∘ gated. The last layer's δ is then the identity.
  std::optional<at::Tensor> gated;
  double gate_scale;  // γ

  SAML_FIELDS(x_local, x_global, permutation, offsets, branch_weights, branch_biases, aux_weights, aux_biases,
              gate_weights, gate_biases, shared_weights, mutual_layers, activations, score, temperature, own_bfloat16,
              foreign_rounding, gated, gate_scale)
};

struct TrunkForwardArguments {
  TrunkSpec trunk;
  bool save;  // for backward
  bool recompute;
  bool all_branches;  // every branch of every sample, for which there must be no mutual layer

  SAML_FIELDS(trunk, save, recompute, all_branches)
};

// In the caller's order of rows, but for what backward takes.
struct TrunkForwardResults {
  at::Tensor own;   // (B, d_L), or of all branches (B, M, d_L)
  at::Tensor aux;   // (B, a_L)
  Tensors scores;   // a mutual layer's own rows of α, rows sorted
  Tensors factors;  // for backward, in its order: what the weight gradients read
  Tensors saved;    // for backward, in its order: what the input gradients read besides

  SAML_FIELDS(own, aux, scores, factors, saved)
};

// Backward is that of the own branch, whatever all_branches was. It has two operators, so that the streams of all
// branches, which only the first one reads, can be given back before the second makes the parameters' gradients.
// Cotangents stand in the caller's order of rows.
struct TrunkBackwardArguments {
  at::Tensor grad_own;
  at::Tensor grad_aux;
  Tensors scores;
  Tensors factors;
  Tensors saved;
  TrunkSpec trunk;
  bool recompute;
  bool need_local;
  bool need_global;

  SAML_FIELDS(grad_own, grad_aux, scores, factors, saved, trunk, recompute, need_local, need_global)
};

// Gradients; those of the inputs stand in the caller's order of rows and are empty where they are not needed.
struct TrunkBackwardResults {
  at::Tensor x_local;
  at::Tensor x_global;
  at::Tensor gated;          // empty where nothing is gated
  Tensors preact_gradients;  // dZ_t, dZa and dz_g layer by layer, rows sorted

  SAML_FIELDS(x_local, x_global, gated, preact_gradients)
};

struct TrunkWeightGradientsArguments {
  Tensors preact_gradients;
  Tensors factors;
  TrunkSpec trunk;

  SAML_FIELDS(preact_gradients, factors, trunk)
};

struct TrunkWeightGradientsResults {
  Tensors branch_weights;
  Tensors branch_biases;
  Tensors aux_weights;
  Tensors aux_biases;
  Tensors gate_weights;
  Tensors gate_biases;
  Tensors shared_weights;

  SAML_FIELDS(branch_weights, branch_biases, aux_weights, aux_biases, gate_weights, gate_biases, shared_weights)
};

// The mutual unit alone, on streams (B, M, d) with rows sorted by scenario.
struct MutualSpec {
  at::Tensor streams;
  at::Tensor permutation;
  at::Tensor offsets;
  at::Tensor gate_weight;
  at::Tensor gate_bias;
  Score score;
  double temperature;
  bool bfloat16;

  SAML_FIELDS(streams, permutation, offsets, gate_weight, gate_bias, score, temperature, bfloat16)
};

struct MutualForwardResults {
  at::Tensor mutual;  // M_t, in the caller's order
  at::Tensor scores;  // own rows of α, rows sorted as all that follows
  at::Tensor own;     // V_t
  at::Tensor gate;    // g

  SAML_FIELDS(mutual, scores, own, gate)
};

struct MutualBackwardArguments {
  at::Tensor gradient;  // of M_t, in the caller's order
  at::Tensor scores;
  at::Tensor own;
  at::Tensor gate;
  MutualSpec unit;

  SAML_FIELDS(gradient, scores, own, gate, unit)
};

struct MutualBackwardResults {
  at::Tensor streams;  // in the caller's order, zero in foreign streams
  at::Tensor gate_weight;
  at::Tensor gate_bias;

  SAML_FIELDS(streams, gate_weight, gate_bias)
};

// K experts, each an MLP on every row. Tensors are of one type, and contiguous.
struct ExpertsSpec {
  at::Tensor x;                         // (B, d_0)
  Tensors weights;                      // (K, d_{l-1}, d_l), one a layer
  Tensors biases;                       // (K, d_l)
  std::vector<Activation> activations;  // one a layer
  bool bfloat16;                        // products take bfloat16 factors

  SAML_FIELDS(x, weights, biases, activations, bfloat16)
};

struct ExpertsForwardArguments {
  ExpertsSpec experts;
  bool save;  // for backward

  SAML_FIELDS(experts, save)
};

struct ExpertsForwardResults {
  at::Tensor out;  // (B, K, d_L)
  Tensors saved;   // for backward, in its order

  SAML_FIELDS(out, saved)
};

struct ExpertsBackwardArguments {
  at::Tensor gradient;  // of out
  at::Tensor out;
  Tensors saved;
  ExpertsSpec experts;
  bool need_input;

  SAML_FIELDS(gradient, out, saved, experts, need_input)
};

// Gradients; that of the input is empty where it is not needed.
struct ExpertsBackwardResults {
  at::Tensor x;
  Tensors weights;
  Tensors biases;

  SAML_FIELDS(x, weights, biases)
};

// Starts keeping laid out weights between calls that save nothing for backward, or ends it: once for every start.
void keep_layouts(bool keep);

// Gives the pages that are kept for calls to come back to the system; their bytes.
int64_t release_memory();

TrunkForwardResults trunk_forward_cpu(const TrunkForwardArguments& arguments);
TrunkBackwardResults trunk_backward_cpu(const TrunkBackwardArguments& arguments);
TrunkWeightGradientsResults trunk_weight_gradients_cpu(const TrunkWeightGradientsArguments& arguments);
MutualForwardResults mutual_forward_cpu(const MutualSpec& unit);
MutualBackwardResults mutual_backward_cpu(const MutualBackwardArguments& arguments);
ExpertsForwardResults experts_forward_cpu(const ExpertsForwardArguments& arguments);
ExpertsBackwardResults experts_backward_cpu(const ExpertsBackwardArguments& arguments);

}  // namespace saml_kernels
