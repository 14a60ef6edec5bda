// The trunk on the CPU: what the kernels of every capability read and write. Plain pointers, so that the translation
// units compiled for a particular instruction set see no library code of their own.
//
// Rows are sorted by scenario. A tile is a run of consecutive sorted rows; it runs through all branches up to the last
// mutual layer and through the own branches after it, while its activations stay in cache.
#pragma once

#include <array>
#include <cstdint>

#include "../activation.h"
#include "matrix_view.h"
#include "row_tiles.h"

namespace saml_kernels {

// How far a panel is that tiles lay out as they come to it.
constexpr uint8_t kNotLaidOut = 0, kBeingLaidOut = 1, kLaidOut = 2;

// The panels of all matrices of a weight, one after the other.
template <typename element_t>
struct Layout {
  element_t* first = nullptr;  // null: not laid out
  // Of a panel at the column of all matrices that it begins with; null: all are laid out before the tiles run.
  uint8_t* states = nullptr;

  bool before_tiles() const { return first != nullptr && states == nullptr; }
};

// A layer's weights (matrices, k1 + k2, n), one matrix a branch, one for the auxiliary layer; and, where enough tiles
// read them to pay for it, the same laid out as the capability's products read them. How is the capability's affair.
template <typename scalar_t>
struct Weights {
  int64_t matrices = 0;
  int64_t k1 = 0;  // rows that meet the first operand
  int64_t k2 = 0;
  int64_t n = 0;
  const void* data = nullptr;  // as `storage` says
  Storage storage = Storage::kComputed;
  const scalar_t* shared = nullptr;  // of products the second factor, (k1 + k2, n), for all matrices
  const scalar_t* bias = nullptr;    // (matrices, n)
  Layout<scalar_t> panels = {};
  Layout<scalar_t> rounded_panels = {};              // floats rounded to bfloat16
  Layout<scalar_t> transposed_panels = {};           // of the transpose, which backward reads
  Layout<uint16_t> bfloat16_panels = {};             // bfloat16 parts
  Layout<uint16_t> transposed_bfloat16_panels = {};  // of the transpose, which backward reads
  Layout<int8_t> int8_panels = {};                   // rounded to int8, with scales
  bool transposed_by_threads = false;                // each lays the transpose of one matrix out, for its tiles
  int64_t parts = 1;                                 // bfloat16 parts of a number: 1 rounds it, 3 are all of a float
  bool passing = false;                              // caches will have lost it before it is read again

  int64_t k() const { return k1 + k2; }
  StoredMatrix<const scalar_t> matrix(int64_t i) const {
    const StoredMatrix<const scalar_t> first(data, k(), n, n, storage);
    return {first.at(i * k(), 0), k(), n, n, storage, shared, passing};
  }
};

struct LayerShape {
  int64_t in_width = 0;    // d_{l-1}
  int64_t aux_in = 0;      // a_{l-1}
  int64_t width = 0;       // d_l
  int64_t aux_width = 0;   // a_l, 0 in a grouped MLP
  int64_t gate_width = 0;  // d_l, 1, or 0 without a mutual unit
  Activation activation = Activation::kIdentity;

  bool has_mutual_unit() const { return gate_width > 0; }
};

// Layer l of the trunk. scalar_t is float or double.
template <typename scalar_t>
struct Layer : LayerShape {
  Weights<scalar_t> branch;     // W (M, d_{l-1} + a_l, d_l)
  Weights<scalar_t> auxiliary;  // Wa (a_{l-1}, a_l)
  Weights<scalar_t> gates;      // U (M, d_l, gate_width)
};

// What forward saves of a layer for backward, which reads it as const. Rows sorted; without data where it is not saved.
// Where products take bfloat16 factors, what they read and what they give stands in bfloat16.
template <typename element_t>
struct Saved {
  StoredMatrix<element_t> own = {};       // V_t before the mutual unit (B, d_l); of a gate sigmoid(Z_t)
  MatrixView<element_t> own_preact = {};  // Z_t, its pre-activation (B, d_l)
  StoredMatrix<element_t> mutual = {};    // M_t (B, d_l)
  StoredMatrix<element_t> aux = {};       // A (B, a_l)
  MatrixView<element_t> aux_preact = {};  // Za (B, a_l)
  StoredMatrix<element_t> streams = {};   // V of all branches (B, M d_l)
  StoredMatrix<element_t> gate = {};      // g (B, gate_width)
  MatrixView<element_t> alpha = {};       // own rows of α (B, M), written whenever there is a mutual unit
};

// A matrix of Saved, whether this layer has it, its shape, (B, width), or (B, branches, width) if branches is not 0,
// and whether it is a factor of weight gradients: what is none can be given back before those are made. Of the two
// places where it is one has none: a pre-activation stands as it is computed.
template <typename element_t>
struct SavedMatrix {
  StoredMatrix<element_t>* stored;
  MatrixView<element_t>* preact;
  bool wanted;
  int64_t branches;
  int64_t width;
  bool factor;
};

// The matrices that forward saves, in one order for both passes. alpha is not among them: it is a result.
template <typename element_t>
std::array<SavedMatrix<element_t>, 7> saved_matrices(Saved<element_t>& saved, const LayerShape& layer,
                                                     int64_t num_scenarios, bool recompute) {
  const bool auxiliary = layer.aux_width > 0, mutual = layer.has_mutual_unit();
  const bool preact = needs_preact(layer.activation);
  return {{{&saved.own, nullptr, true, 0, layer.width, true},
           {nullptr, &saved.own_preact, preact, 0, layer.width, false},
           {&saved.mutual, nullptr, mutual, 0, layer.width, true},
           {&saved.aux, nullptr, auxiliary, 0, layer.aux_width, true},
           {nullptr, &saved.aux_preact, auxiliary && preact, 0, layer.aux_width, false},
           {&saved.streams, nullptr, mutual && !recompute, num_scenarios, layer.width, false},
           {&saved.gate, nullptr, mutual, 0, layer.gate_width, false}}};
}

// The same of a layer of experts.
template <typename element_t>
std::array<SavedMatrix<element_t>, 2> saved_of_experts(Saved<element_t>& saved, const LayerShape& layer, bool last) {
  const bool preact = needs_preact(layer.activation);
  return {{{&saved.own, nullptr, !last, 0, layer.width, true},
           {nullptr, &saved.own_preact, preact, 0, layer.width, false}}};
}

// Stored as the parameter is.
struct ParameterGradient {
  void* weight = nullptr;
  void* bias = nullptr;
  Storage storage = Storage::kComputed;
};

// What backward writes of a layer.
template <typename scalar_t>
struct LayerGradients {
  // Of the pre-activations: written with the input gradients, read by the weight gradients. Rows sorted.
  StoredMatrix<scalar_t> dz = {};       // dZ_t (B, d_l)
  StoredMatrix<scalar_t> dz_aux = {};   // dZa (B, a_l)
  StoredMatrix<scalar_t> dz_gate = {};  // dz_g (B, gate_width)

  ParameterGradient branch = {};
  ParameterGradient auxiliary = {};
  ParameterGradient gates = {};
};

// Threads that share the products of one tile out among them, where there are too few rows for tiles of their own.
// share_out calls item(context, i, worker) for i in 0 .. count, worker in 0 .. workers being the thread's, and returns
// when all are done.
struct Team {
  using Item = void (*)(void* context, int64_t i, int64_t worker);

  int64_t workers = 1;  // 1: a tile is one thread's
  void* tile = nullptr;
  void (*share_out)(void* tile, int64_t count, Item item, void* context) = nullptr;
};

// Up to this many rows a weight that is not laid out is read in place: packing it costs as much as using it.
constexpr int64_t kRowsWithoutPacking = 24;

// Up to this many rows it is read in place also where panels of it are at hand.
constexpr int64_t kRowsBeforePanels = 8;

// Multiplications that are worth sharing out: calling another thread takes as long as some ten thousand of them.
constexpr int64_t kLeastSharedWork = 1 << 17;

// Whether products of so many rows with each of `matrices` matrices are: reading a weight takes as long as a few rows'
// product with it.
template <typename scalar_t>
bool worth_sharing(int64_t rows, int64_t matrices, const Weights<scalar_t>& weights) {
  constexpr int64_t kRowsForTheReading = 8;
  return matrices * weights.k() * weights.n * (kRowsForTheReading + rows) / kRowsForTheReading >= kLeastSharedWork;
}

// What both passes read.
template <typename scalar_t>
struct Trunk {
  int64_t rows = 0;
  int64_t num_scenarios = 0;
  int64_t num_layers = 0;
  int64_t num_shared = 0;  // layers that all branches run: up to and with the last mutual one, or all
  RowTiles tiles = {};
  Score score = Score::kRatio;
  double temperature = 0;
  bool per_branch_input = false;
  bool all_branches = false;
  bool own_bfloat16 = false;                    // products of own branches and auxiliary layers take bfloat16 factors
  Rounding foreign_rounding = Rounding::kNone;  // of factors of foreign branches
  // Branches are experts: every row trains all of them, and no row has an own one. What is saved of a layer and dz are
  // then (K B, d_l), expert by expert, but the last layer's V, the result (B, K d_L); rows stand in the caller's order.
  bool experts = false;

  const int64_t* permutation = nullptr;        // (B,); null for experts
  const int64_t* offsets = nullptr;            // (M + 1,); for experts where the rows of each begin among the K B
  StoredMatrix<const scalar_t> x_local = {};   // (B, D_l) or (B, M D_l), the caller's order
  StoredMatrix<const scalar_t> x_global = {};  // (B, D_g), the caller's order
  StoredMatrix<const scalar_t> gated = {};     // (B, d_L), the caller's order; without data where nothing is gated
  MatrixView<const scalar_t> streams = {};     // (B, M d), rows sorted: the mutual unit alone
  scalar_t gate_scale = 0;                     // γ
  const Layer<scalar_t>* layers = nullptr;
  Team team = {};  // of the forward's only tile

  // V^l of all branches stands in bfloat16: only a mutual unit reads it, and of that backward reads it so, too.
  bool rounds_streams(int64_t l) const { return own_bfloat16 && layers[l].has_mutual_unit() && l + 1 == num_shared; }
  Rounding own_rounding() const { return own_bfloat16 ? Rounding::kBfloat16 : Rounding::kNone; }
  int64_t num_tiles() const { return tiles.count; }
  int64_t tile_rows() const { return tiles.most_rows(); }
};

// Results stand in the caller's order of rows.
template <typename scalar_t>
struct ForwardPass {
  const Trunk<scalar_t>& trunk;
  const Saved<scalar_t>* saved;     // of every layer
  StoredMatrix<scalar_t> own = {};  // (B, d_L), or (B, M d_L) of all branches, (B, K d_L) of experts
  StoredMatrix<scalar_t> aux = {};  // (B, a_L)
};

// Cotangents and input gradients stand in the caller's order of rows.
template <typename scalar_t>
struct BackwardPass {
  const Trunk<scalar_t>& trunk;
  const Saved<const scalar_t>* saved;         // of every layer
  const LayerGradients<scalar_t>* gradients;  // of every layer
  StoredMatrix<const scalar_t> grad_own = {};
  StoredMatrix<const scalar_t> grad_aux = {};
  StoredMatrix<scalar_t> grad_x_local = {};  // without data if not needed
  StoredMatrix<scalar_t> grad_x_global = {};
  StoredMatrix<scalar_t> grad_gated = {};  // with data where something is gated
  StoredMatrix<const scalar_t> out = {};   // of experts forward's result
};

// A slice of the weight gradients that one thread computes: no two items write the same place.
struct GradientItem {
  enum class Kind : int64_t { kBranch, kAuxiliary, kGate };
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
  bool bfloat16;     // products of bfloat16 factors read bfloat16 panels; input gradients, transposed ones
  bool float_parts;  // so do products of float factors, in three parts
};

// What one instruction set provides. Scratch is a block of the bytes that the function before it asks for, aligned to
// 64.
template <typename scalar_t>
struct TrunkKernels {
  Layouts layouts;
  RowMultiples row_multiples;
  // Rows of a weight in one GradientItem, at most and, but for a remainder, at least.
  int64_t gradient_item_rows;
  int64_t least_gradient_item_rows;
  // Elements of one matrix in panels of every kind.
  int64_t (*panels_size)(const Weights<scalar_t>&);
  int64_t (*transposed_float_panels_size)(const Weights<scalar_t>&);
  int64_t (*bfloat16_panels_size)(const Weights<scalar_t>&);
  int64_t (*transposed_panels_size)(const Weights<scalar_t>&);
  int64_t (*int8_panels_size)(const Weights<scalar_t>&);  // bytes
  void (*lay_out)(const PanelItem<scalar_t>& item);
  int64_t (*forward_scratch)(const Trunk<scalar_t>&);
  void (*forward_tile)(const ForwardPass<scalar_t>&, int64_t tile, void* scratch);
  int64_t (*backward_scratch)(const BackwardPass<scalar_t>&);
  // Before the first tile that is computed in this scratch.
  void (*begin_backward)(const BackwardPass<scalar_t>&, void* scratch);
  void (*backward_tile)(const BackwardPass<scalar_t>&, int64_t tile, void* scratch);
  // The mutual unit alone: a trunk of one layer without products, whose streams are x_local.
  void (*mutual_forward_tile)(const ForwardPass<scalar_t>&, int64_t tile, void* scratch);
  void (*mutual_backward_tile)(const BackwardPass<scalar_t>&, int64_t tile, void* scratch);
  // Experts, each tile through all of them.
  int64_t (*experts_forward_scratch)(const Trunk<scalar_t>&);
  void (*experts_forward_tile)(const ForwardPass<scalar_t>&, int64_t tile, void* scratch);
  int64_t (*experts_backward_scratch)(const Trunk<scalar_t>&);
  void (*experts_backward_tile)(const BackwardPass<scalar_t>&, int64_t tile, void* scratch);
  int64_t (*gradient_scratch)(const Trunk<scalar_t>&);
  void (*gradient_item)(const BackwardPass<scalar_t>&, const GradientItem& item, void* scratch);
};

struct Capability {
  const char* name;
  TrunkKernels<float> float_kernels;
  const TrunkKernels<double>* double_kernels;
};

extern const Capability kBaseline;
extern const TrunkKernels<double> kBaselineDoubles;
#if defined(__x86_64__)
extern const Capability kAvx2;
extern const Capability kAvx2Vnni;
extern const Capability kAvx512;
extern const Capability kAvx512Vnni;
extern const Capability kAvx512Bf16;
extern const Capability kAmx;
// Dot products of int8 or bfloat16 and tiles have nothing more for doubles: what they extend runs these.
extern const TrunkKernels<double> kAvx2Doubles;
extern const TrunkKernels<double> kAvx512Doubles;
#endif

}  // namespace saml_kernels
