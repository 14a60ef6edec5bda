// The trunk on the CPU: what the kernels of every capability read and write. Plain pointers, so that the translation
// units compiled for a particular instruction set see no library code of their own.
//
// Rows are sorted by scenario. A tile is a run of consecutive sorted rows; it runs through all branches up to the last
// mutual layer and through the own branches after it, while its activations stay in cache.
#pragma once

#include <cstdint>

namespace saml_kernels {

enum class Activation : int64_t { kRelu, kLeakyRelu, kGelu, kSilu, kTanh, kIdentity };
enum class Score : int64_t { kRatio, kSoftmax };

// gelu and silu are not monotone, so their derivative needs the argument; the others' follows from the value.
inline bool derivative_needs_argument(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kSilu;
}

// A layer's weights (matrices, k1 + k2, n), one matrix a branch, one for the auxiliary layer; and, where enough tiles
// read them to pay for it, the same laid out as the capability's products read them. How is the capability's affair.
template <typename scalar_t>
struct Weights {
  int64_t matrices;
  int64_t k1;  // rows that meet the first operand
  int64_t k2;
  int64_t n;
  const scalar_t* data;
  const scalar_t* bias;                  // (matrices, n)
  scalar_t* panels;                      // null: not laid out
  uint16_t* bfloat16_panels;             // bfloat16 parts; null: not laid out
  uint16_t* transposed_bfloat16_panels;  // of the transpose, which backward reads
  int64_t parts;                         // bfloat16 parts of a number: 1 is the rounded number, 3 are all of a float

  int64_t k() const { return k1 + k2; }
  const scalar_t* matrix(int64_t i) const { return data + i * k() * n; }
};

// Layer l of the trunk. scalar_t is float or double.
template <typename scalar_t>
struct Layer {
  int64_t in_width;    // d_{l-1}
  int64_t aux_in;      // a_{l-1}
  int64_t width;       // d_l
  int64_t aux_width;   // a_l, 0 in a grouped MLP
  int64_t gate_width;  // d_l, 1, or 0 without a mutual unit
  Activation activation;

  Weights<scalar_t> branch;   // W (M, d_{l-1} + a_l, d_l)
  Weights<scalar_t> aux_net;  // Wa (a_{l-1}, a_l)
  Weights<scalar_t> gates;    // U (M, d_l, gate_width)

  // Kept by forward for backward, rows sorted; null where it is not kept.
  scalar_t* own;           // V_t before the mutual unit (B, d_l)
  scalar_t* own_argument;  // δ's argument (B, d_l)
  scalar_t* mutual;        // M_t (B, d_l)
  scalar_t* aux;           // A (B, a_l)
  scalar_t* aux_argument;  // (B, a_l)
  scalar_t* streams;       // V of all branches (B, M, d_l)
  scalar_t* gate;          // g (B, gate_width)
  scalar_t* alpha;         // own rows of α (B, M), needed whenever there is a mutual unit

  // Written by the input gradients, read by the weight gradients, rows sorted.
  scalar_t* grad_argument;       // dz (B, d_l)
  scalar_t* grad_aux_argument;   // (B, a_l)
  scalar_t* grad_gate_argument;  // (B, gate_width)

  scalar_t* grad_weight;
  scalar_t* grad_bias;
  scalar_t* grad_aux_weight;
  scalar_t* grad_aux_bias;
  scalar_t* grad_gate_weight;
  scalar_t* grad_gate_bias;

  bool has_mutual_unit() const { return gate_width > 0; }
};

template <typename scalar_t>
struct Trunk {
  int64_t rows;
  int64_t num_scenarios;
  int64_t num_layers;
  int64_t num_shared;  // layers that all branches run: up to and with the last mutual one, or all
  int64_t tile_rows;
  Score score;
  double temperature;
  bool per_branch_input;
  bool all_branches;
  bool own_bfloat16;      // products of own branches and auxiliary layers take bfloat16 factors
  bool foreign_bfloat16;  // products of foreign branches do

  const int64_t* permutation;  // (B,)
  const int64_t* offsets;      // (M + 1,)
  const scalar_t* x_local;     // (B, D_l) or (B, M, D_l), rows sorted
  const scalar_t* x_global;    // (B, D_g), rows sorted
  Layer<scalar_t>* layers;

  scalar_t* out_own;  // (B, d_L), or (B, M, d_L) if all layers are shared, in the caller's order
  scalar_t* out_aux;  // (B, a_L), in the caller's order; null without auxiliary network

  const scalar_t* grad_own;  // cotangents in the caller's order
  const scalar_t* grad_aux;
  scalar_t* grad_x_local;   // in the caller's order, null if not needed
  scalar_t* grad_x_global;  // likewise

  int64_t num_tiles() const { return (rows + tile_rows - 1) / tile_rows; }
};

// A slice of the weight gradients that one thread computes: no two items write the same place.
struct GradientItem {
  enum class Kind : int64_t { kBranch, kAux, kGate };
  Kind kind;
  int64_t layer;
  int64_t scenario;
  int64_t begin;  // rows of the weight
  int64_t end;
};

// One matrix to lay out in panels.
template <typename scalar_t>
struct PanelItem {
  const Weights<scalar_t>* weights;
  int64_t matrix;
};

// Which layouts of weights a capability's products read.
struct Layouts {
  bool bfloat16;     // products of bfloat16 factors read bfloat16 panels
  bool float_parts;  // so do products of float factors, in three parts
  bool transposed;   // the input gradients read transposed ones
};

// What one instruction set provides. Scratch is a block of scratch_bytes, aligned to 64.
template <typename scalar_t>
struct TrunkKernels {
  Layouts layouts;
  int64_t row_multiple;        // tiles of rows are multiples of it, but the last
  int64_t gradient_item_rows;  // rows of a weight in one GradientItem
  // Elements of one matrix in panels, in bfloat16 panels, in transposed ones.
  int64_t (*panels_size)(const Weights<scalar_t>&);
  int64_t (*bfloat16_panels_size)(const Weights<scalar_t>&);
  int64_t (*transposed_panels_size)(const Weights<scalar_t>&);
  void (*lay_out)(const PanelItem<scalar_t>& item);
  int64_t (*forward_scratch)(const Trunk<scalar_t>&);
  void (*forward_tile)(const Trunk<scalar_t>&, int64_t tile, void* scratch);
  int64_t (*backward_scratch)(const Trunk<scalar_t>&);
  void (*backward_tile)(const Trunk<scalar_t>&, int64_t tile, void* scratch);
  // The mutual unit alone: a trunk of one layer without products, whose streams are given.
  void (*mutual_forward_tile)(const Trunk<scalar_t>&, int64_t tile, void* scratch);
  void (*mutual_backward_tile)(const Trunk<scalar_t>&, int64_t tile, void* scratch);
  int64_t (*gradient_scratch)(const Trunk<scalar_t>&);
  void (*gradient_item)(const Trunk<scalar_t>&, const GradientItem& item, void* scratch);
};

struct Capability {
  const char* name;
  TrunkKernels<float> float_kernels;
  TrunkKernels<double> double_kernels;
};

extern const Capability kBaseline;
#if defined(__x86_64__)
extern const Capability kAvx2;
extern const Capability kAvx512;
extern const Capability kAvx512Bf16;
extern const Capability kAmx;
#endif

}  // namespace saml_kernels
