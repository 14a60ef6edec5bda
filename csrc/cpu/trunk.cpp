// The trunk's operations on the CPU: tensors in, tiles handed to the threads, tensors out.

#include "trunk.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../trunk_ops.h"

namespace saml_kernels {
namespace {

// Rows of a tile: many use a weight often while it is in cache, few leave every core its share. How a row is computed
// depends on neither, so the number of threads may decide.
int64_t tile_rows(int64_t rows, int64_t multiple) {
  constexpr int64_t kMostRows = 96, kTilesPerThread = 2;
  const int64_t share = rows / (kTilesPerThread * at::get_num_threads());
  return std::clamp((share + multiple - 1) / multiple * multiple, multiple, kMostRows);
}

#if defined(__x86_64__) && defined(__linux__)
// AMX state is large, so Linux wants a process to ask for it, once; threads and children inherit the answer.
bool amx_permitted() {
  constexpr long kRequestComponentPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestComponentPermission, kTileData) == 0;
}
#else
bool amx_permitted() { return false; }
#endif

const std::vector<const Capability*>& capabilities() {
  // Best first.
  static const std::vector<const Capability*> supported = [] {
    std::vector<const Capability*> result;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bfloat16_dot = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bfloat16_dot && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && amx_permitted()) {
      result.push_back(&kAmx);
    }
    if (bfloat16_dot) {
      result.push_back(&kAvx512Bf16);
    }
    if (avx512) {
      result.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      result.push_back(&kAvx2);
    }
#endif
    result.push_back(&kBaseline);
    return result;
  }();
  return supported;
}

// The environment variable is read at every call, so that one process can test every path.
const Capability& capability() {
  const char* wanted = std::getenv("SAML_KERNELS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return *capabilities().front();
  }
  std::string names;
  for (const Capability* candidate : capabilities()) {
    if (std::string(wanted) == candidate->name) {
      return *candidate;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate->name;
  }
  TORCH_CHECK_VALUE(false, "SAML_KERNELS_CPU_CAPABILITY must be one of ", names, " on this machine, got ", wanted);
}

template <typename scalar_t>
const TrunkKernels<scalar_t>& kernels() {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return capability().float_kernels;
  } else {
    return capability().double_kernels;
  }
}

struct AlignedBlock {
  static constexpr std::align_val_t kAlignment{64};
  explicit AlignedBlock(int64_t bytes) : data(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  ~AlignedBlock() { ::operator delete(data, kAlignment); }
  AlignedBlock(const AlignedBlock&) = delete;
  AlignedBlock& operator=(const AlignedBlock&) = delete;
  void* data;
};

// function(item, scratch) for items 0 .. count, each thread taking the next one when it is free.
template <typename Function>
void for_each_item(int64_t count, int64_t scratch_bytes, const Function& function) {
  if (count == 0) {
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const AlignedBlock scratch(scratch_bytes);
    for (int64_t item = next++; item < count; item = next++) {
      function(item, scratch.data);
    }
  });
}

template <typename scalar_t>
scalar_t* data_of(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? const_cast<scalar_t*>(tensor.const_data_ptr<scalar_t>()) : nullptr;
}

// (M, K, N) or (K, N), of which the first k1 rows meet the first operand.
template <typename scalar_t>
Weights<scalar_t> weights_of(const at::Tensor& weight, const at::Tensor& bias, int64_t k1) {
  const int64_t matrices = weight.dim() == 3 ? weight.size(0) : 1;
  return {matrices,
          k1,
          weight.size(-2) - k1,
          weight.size(-1),
          data_of<scalar_t>(weight),
          data_of<scalar_t>(bias),
          nullptr,
          nullptr,
          nullptr,
          1};
}

// The trunk's description, and ownership of what it points to.
template <typename scalar_t>
struct Problem {
  Trunk<scalar_t> trunk{};
  std::vector<Layer<scalar_t>> layers;
  std::vector<at::Tensor> panels;
};

template <typename scalar_t>
Problem<scalar_t> describe(const TrunkInputs& inputs) {
  Problem<scalar_t> problem;
  problem.layers.resize(inputs.branch_weights.size());
  const bool auxiliary = !inputs.aux_weights.empty();
  int64_t gate = 0;
  int64_t num_shared = 0;
  int64_t in_width = inputs.x_local.size(-1), aux_in = inputs.x_global.size(1);
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    layer = {};
    layer.in_width = in_width;
    layer.aux_in = aux_in;
    layer.width = in_width = inputs.branch_weights[l].size(2);
    layer.aux_width = aux_in = auxiliary ? inputs.aux_weights[l].size(1) : 0;
    layer.activation = static_cast<Activation>(inputs.activations[l]);
    layer.branch = weights_of<scalar_t>(inputs.branch_weights[l], inputs.branch_biases[l], layer.in_width);
    if (auxiliary) {
      layer.aux_net = weights_of<scalar_t>(inputs.aux_weights[l], inputs.aux_biases[l], layer.aux_in);
    }
    if (std::find(inputs.mutual_layers.begin(), inputs.mutual_layers.end(), static_cast<int64_t>(l)) !=
        inputs.mutual_layers.end()) {
      layer.gate_width = inputs.gate_weights[gate].size(2);
      layer.gates = weights_of<scalar_t>(inputs.gate_weights[gate], inputs.gate_biases[gate], layer.width);
      ++gate;
      num_shared = static_cast<int64_t>(l) + 1;
    }
  }
  Trunk<scalar_t>& trunk = problem.trunk;
  trunk.rows = inputs.x_local.size(0);
  trunk.num_scenarios = inputs.branch_weights[0].size(0);
  trunk.num_layers = static_cast<int64_t>(problem.layers.size());
  trunk.num_shared = num_shared;
  trunk.tile_rows = tile_rows(trunk.rows, kernels<scalar_t>().row_multiple);
  trunk.score = static_cast<Score>(inputs.score);
  trunk.temperature = inputs.temperature;
  trunk.per_branch_input = inputs.x_local.dim() == 3;
  trunk.own_bfloat16 = inputs.own_bfloat16;
  trunk.foreign_bfloat16 = inputs.foreign_bfloat16;
  trunk.permutation = data_of<int64_t>(inputs.permutation);
  trunk.offsets = data_of<int64_t>(inputs.offsets);
  trunk.x_local = data_of<scalar_t>(inputs.x_local);
  trunk.x_global = data_of<scalar_t>(inputs.x_global);
  trunk.layers = problem.layers.data();
  return problem;
}

// Lays out every matrix that enough rows read to pay for it; which ones depends on the batch alone, as a product of
// laid out factors may round differently. `forward`: for the trunk's products; `backward`: for those of the input
// gradients.
template <typename scalar_t>
void lay_out_weights(Problem<scalar_t>& problem, const TrunkKernels<scalar_t>& kernel, bool forward, bool backward) {
  // Each scenario's own rows follow each other and find its weights in cache; laying all of them out writes to memory
  // first what is read back hardly more often.
  constexpr int64_t kRowsOfUse = 32, kUses = 3, kOwnUses = 12;
  const Trunk<scalar_t>& trunk = problem.trunk;
  const int64_t uses = trunk.rows / kRowsOfUse, own_uses = uses / trunk.num_scenarios;
  std::vector<PanelItem<scalar_t>> items;
  const auto bfloat16_block = [&](int64_t elements) {
    problem.panels.push_back(at::empty({elements}, at::kBFloat16));
    return static_cast<uint16_t*>(problem.panels.back().data_ptr());
  };
  // `own` uses of a matrix in the own precision, `foreign` ones in the foreign.
  const auto add = [&](Weights<scalar_t>& weights, int64_t own, int64_t foreign) {
    const bool one_precision = trunk.own_bfloat16 == trunk.foreign_bfloat16;
    const int64_t in_bfloat16 = (trunk.own_bfloat16 ? own : 0) + (trunk.foreign_bfloat16 ? foreign : 0);
    const int64_t in_floats = one_precision && !trunk.own_bfloat16 ? own + foreign : trunk.own_bfloat16 ? 0 : own;
    const bool parts = kernel.layouts.float_parts && (in_floats + in_bfloat16 >= kUses || trunk.own_bfloat16);
    weights.parts = kernel.layouts.float_parts && !trunk.own_bfloat16 ? 3 : 1;
    const bool own_only = foreign == 0 && weights.matrices > 1;
    if (forward && !parts && in_floats >= (own_only ? kOwnUses : kUses)) {
      problem.panels.push_back(
          at::empty({weights.matrices * kernel.panels_size(weights)}, c10::CppTypeToScalarType<scalar_t>::value));
      weights.panels = data_of<scalar_t>(problem.panels.back());
    }
    if (forward && (parts || (kernel.layouts.bfloat16 && in_bfloat16 >= kUses))) {
      weights.bfloat16_panels = bfloat16_block(weights.matrices * kernel.bfloat16_panels_size(weights));
    }
    if (backward && kernel.layouts.transposed && (own >= kUses || trunk.own_bfloat16)) {
      weights.transposed_bfloat16_panels = bfloat16_block(weights.matrices * kernel.transposed_panels_size(weights));
    }
    if (weights.panels != nullptr || weights.bfloat16_panels != nullptr ||
        weights.transposed_bfloat16_panels != nullptr) {
      for (int64_t i = 0; i < weights.matrices; ++i) {
        items.push_back({&weights, i});
      }
    }
  };
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    if (layer.aux_width > 0) {
      add(layer.aux_net, uses, 0);
    }
    // All rows read the weights of layers that all branches run; their gates too, but at the last of them.
    add(layer.branch, own_uses, l < trunk.num_shared ? uses - own_uses : 0);
    if (layer.has_mutual_unit()) {
      add(layer.gates, own_uses, l + 1 < trunk.num_shared ? uses - own_uses : 0);
    }
  }
  for_each_item(static_cast<int64_t>(items.size()), 1, [&](int64_t item, void*) { kernel.lay_out(items[item]); });
}

// The buffers that forward keeps for backward, in one order for both: a field of Layer, and its shape if this layer
// has it.
template <typename scalar_t>
struct Kept {
  scalar_t* Layer<scalar_t>::* field;
  std::optional<std::vector<int64_t>> (*shape)(const Trunk<scalar_t>&, const Layer<scalar_t>&, bool recompute);
};

template <typename scalar_t>
const std::vector<Kept<scalar_t>>& kept_buffers() {
  using T = Trunk<scalar_t>;
  using L = Layer<scalar_t>;
  using Shape = std::optional<std::vector<int64_t>>;
  static const std::vector<Kept<scalar_t>> table = {
      {&L::own, [](const T& t, const L& l, bool) { return Shape({t.rows, l.width}); }},
      {&L::own_argument,
       [](const T& t, const L& l, bool) {
         return derivative_needs_argument(l.activation) ? Shape({t.rows, l.width}) : std::nullopt;
       }},
      {&L::mutual,
       [](const T& t, const L& l, bool) { return l.has_mutual_unit() ? Shape({t.rows, l.width}) : std::nullopt; }},
      {&L::aux,
       [](const T& t, const L& l, bool) { return l.aux_width > 0 ? Shape({t.rows, l.aux_width}) : std::nullopt; }},
      {&L::aux_argument,
       [](const T& t, const L& l, bool) {
         return l.aux_width > 0 && derivative_needs_argument(l.activation) ? Shape({t.rows, l.aux_width})
                                                                           : std::nullopt;
       }},
      {&L::streams,
       [](const T& t, const L& l, bool recompute) {
         return l.has_mutual_unit() && !recompute ? Shape({t.rows, t.num_scenarios, l.width}) : std::nullopt;
       }},
      {&L::gate,
       [](const T& t, const L& l, bool) { return l.has_mutual_unit() ? Shape({t.rows, l.gate_width}) : std::nullopt; }},
  };
  return table;
}

template <typename scalar_t>
TrunkForward forward(const TrunkInputs& inputs, bool keep, bool recompute, bool all_branches) {
  Problem<scalar_t> problem = describe<scalar_t>(inputs);
  Trunk<scalar_t>& trunk = problem.trunk;
  if (all_branches) {
    trunk.all_branches = true;
    trunk.num_shared = trunk.num_layers;
  }
  const auto options = inputs.x_local.options();
  TrunkForward result;
  for (Layer<scalar_t>& layer : problem.layers) {
    for (const Kept<scalar_t>& buffer : kept_buffers<scalar_t>()) {
      const auto shape = keep ? buffer.shape(trunk, layer, recompute) : std::nullopt;
      if (shape) {
        result.kept.push_back(at::empty(*shape, options));
        layer.*buffer.field = data_of<scalar_t>(result.kept.back());
      }
    }
    if (layer.has_mutual_unit()) {
      result.scores.push_back(at::empty({trunk.rows, trunk.num_scenarios}, options));
      layer.alpha = data_of<scalar_t>(result.scores.back());
    }
  }
  const Layer<scalar_t>& last = problem.layers.back();
  result.own = all_branches ? at::empty({trunk.rows, trunk.num_scenarios, last.width}, options)
                            : at::empty({trunk.rows, last.width}, options);
  result.aux = at::empty({trunk.rows, last.aux_width}, options);
  trunk.out_own = data_of<scalar_t>(result.own);
  trunk.out_aux = data_of<scalar_t>(result.aux);
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  lay_out_weights(problem, kernel, true, false);
  for_each_item(trunk.num_tiles(), kernel.forward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.forward_tile(trunk, tile, scratch); });
  return result;
}

void add_gradient_items(std::vector<GradientItem>& items, GradientItem::Kind kind, int64_t layer, int64_t scenario,
                        int64_t height, int64_t rows) {
  // A weight without rows still has a bias.
  for (int64_t begin = 0; begin == 0 || begin < height; begin += rows) {
    items.push_back({kind, layer, scenario, begin, std::min(begin + rows, height)});
  }
}

template <typename scalar_t>
std::vector<GradientItem> gradient_items(const Trunk<scalar_t>& trunk, int64_t rows) {
  using Kind = GradientItem::Kind;
  std::vector<GradientItem> items;
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    if (layer.aux_width > 0) {
      add_gradient_items(items, Kind::kAux, l, 0, layer.aux_in, rows);
    }
    for (int64_t k = 0; k < trunk.num_scenarios; ++k) {
      add_gradient_items(items, Kind::kBranch, l, k, layer.in_width + layer.aux_width, rows);
      if (layer.has_mutual_unit()) {
        add_gradient_items(items, Kind::kGate, l, k, layer.width, rows);
      }
    }
  }
  return items;
}

template <typename scalar_t>
TrunkBackward backward(const TrunkInputs& inputs, const at::Tensor& grad_own, const at::Tensor& grad_aux,
                       at::TensorList scores, at::TensorList kept, bool recompute, bool need_local, bool need_global) {
  Problem<scalar_t> problem = describe<scalar_t>(inputs);
  Trunk<scalar_t>& trunk = problem.trunk;
  const auto options = inputs.x_local.options();
  size_t next = 0;
  std::vector<at::Tensor> argument_gradients;
  const auto argument_gradient = [&](int64_t width) {
    argument_gradients.push_back(at::empty({trunk.rows, width}, options));
    return data_of<scalar_t>(argument_gradients.back());
  };
  TrunkBackward result;
  size_t gate = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    for (const Kept<scalar_t>& buffer : kept_buffers<scalar_t>()) {
      if (buffer.shape(trunk, layer, recompute)) {
        layer.*buffer.field = data_of<scalar_t>(kept[next++]);
      }
    }
    layer.grad_argument = argument_gradient(layer.width);
    if (layer.aux_width > 0) {
      layer.grad_aux_argument = argument_gradient(layer.aux_width);
    }
    if (layer.has_mutual_unit()) {
      layer.alpha = data_of<scalar_t>(scores[gate++]);
      layer.grad_gate_argument = argument_gradient(layer.gate_width);
    }
  }
  trunk.grad_own = data_of<scalar_t>(grad_own);
  trunk.grad_aux = data_of<scalar_t>(grad_aux);
  result.x_local = at::empty({0}, options);
  result.x_global = at::empty({0}, options);
  if (need_local) {
    // Foreign views of a per-branch input receive nothing.
    result.x_local = trunk.per_branch_input ? at::zeros(inputs.x_local.sizes(), options)
                                            : at::empty(inputs.x_local.sizes(), options);
    trunk.grad_x_local = data_of<scalar_t>(result.x_local);
  }
  if (need_global) {
    const bool read = problem.layers[0].aux_width > 0;
    result.x_global = read ? at::empty(inputs.x_global.sizes(), options) : at::zeros(inputs.x_global.sizes(), options);
    trunk.grad_x_global = read ? data_of<scalar_t>(result.x_global) : nullptr;
  }
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  if (recompute || kernel.layouts.transposed) {
    lay_out_weights(problem, kernel, recompute, true);
  }
  for_each_item(trunk.num_tiles(), kernel.backward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.backward_tile(trunk, tile, scratch); });
  // The weights' panels make room for the weights' gradients.
  problem.panels.clear();
  const auto gradient_of = [&](std::vector<at::Tensor>& list, const at::Tensor& parameter) {
    list.push_back(at::empty(parameter.sizes(), options));
    return data_of<scalar_t>(list.back());
  };
  gate = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    layer.grad_weight = gradient_of(result.branch_weights, inputs.branch_weights[l]);
    layer.grad_bias = gradient_of(result.branch_biases, inputs.branch_biases[l]);
    if (layer.aux_width > 0) {
      layer.grad_aux_weight = gradient_of(result.aux_weights, inputs.aux_weights[l]);
      layer.grad_aux_bias = gradient_of(result.aux_biases, inputs.aux_biases[l]);
    }
    if (layer.has_mutual_unit()) {
      layer.grad_gate_weight = gradient_of(result.gate_weights, inputs.gate_weights[gate]);
      layer.grad_gate_bias = gradient_of(result.gate_biases, inputs.gate_biases[gate]);
      ++gate;
    }
  }
  const std::vector<GradientItem> items = gradient_items(trunk, kernel.gradient_item_rows);
  for_each_item(static_cast<int64_t>(items.size()), kernel.gradient_scratch(trunk),
                [&](int64_t item, void* scratch) { kernel.gradient_item(trunk, items[item], scratch); });
  return result;
}

// The mutual unit alone as a trunk: one layer, whose streams are given.
template <typename scalar_t>
Problem<scalar_t> describe(const MutualInputs& inputs) {
  Problem<scalar_t> problem;
  problem.layers.resize(1);
  Layer<scalar_t>& layer = problem.layers[0];
  layer = {};
  layer.width = inputs.streams.size(2);
  layer.gate_width = inputs.gate_weight.size(2);
  layer.activation = Activation::kIdentity;
  layer.gates = weights_of<scalar_t>(inputs.gate_weight, inputs.gate_bias, layer.width);
  layer.streams = data_of<scalar_t>(inputs.streams);
  Trunk<scalar_t>& trunk = problem.trunk;
  trunk.rows = inputs.streams.size(0);
  trunk.num_scenarios = inputs.streams.size(1);
  trunk.num_layers = trunk.num_shared = 1;
  trunk.tile_rows = tile_rows(trunk.rows, kernels<scalar_t>().row_multiple);
  trunk.score = static_cast<Score>(inputs.score);
  trunk.temperature = inputs.temperature;
  trunk.own_bfloat16 = trunk.foreign_bfloat16 = inputs.bfloat16;
  trunk.permutation = data_of<int64_t>(inputs.permutation);
  trunk.offsets = data_of<int64_t>(inputs.offsets);
  trunk.layers = problem.layers.data();
  return problem;
}

template <typename scalar_t>
MutualForward mutual_forward(const MutualInputs& inputs) {
  Problem<scalar_t> problem = describe<scalar_t>(inputs);
  Trunk<scalar_t>& trunk = problem.trunk;
  Layer<scalar_t>& layer = problem.layers[0];
  const auto options = inputs.streams.options();
  MutualForward result{
      at::empty({trunk.rows, layer.width}, options), at::empty({trunk.rows, trunk.num_scenarios}, options),
      at::empty({trunk.rows, layer.width}, options), at::empty({trunk.rows, layer.gate_width}, options)};
  trunk.out_own = data_of<scalar_t>(result.mutual);
  layer.alpha = data_of<scalar_t>(result.scores);
  layer.own = data_of<scalar_t>(result.own);
  layer.gate = data_of<scalar_t>(result.gate);
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  for_each_item(trunk.num_tiles(), kernel.forward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.mutual_forward_tile(trunk, tile, scratch); });
  return result;
}

template <typename scalar_t>
MutualBackward mutual_backward(const MutualInputs& inputs, const at::Tensor& gradient, const MutualForward& kept) {
  Problem<scalar_t> problem = describe<scalar_t>(inputs);
  Trunk<scalar_t>& trunk = problem.trunk;
  Layer<scalar_t>& layer = problem.layers[0];
  const auto options = inputs.streams.options();
  const at::Tensor gate_argument = at::empty({trunk.rows, layer.gate_width}, options);
  // Foreign streams receive nothing.
  MutualBackward result{at::zeros(inputs.streams.sizes(), options), at::empty(inputs.gate_weight.sizes(), options),
                        at::empty(inputs.gate_bias.sizes(), options)};
  layer.alpha = data_of<scalar_t>(kept.scores);
  layer.own = data_of<scalar_t>(kept.own);
  layer.gate = data_of<scalar_t>(kept.gate);
  layer.grad_gate_argument = data_of<scalar_t>(gate_argument);
  layer.grad_gate_weight = data_of<scalar_t>(result.gate_weight);
  layer.grad_gate_bias = data_of<scalar_t>(result.gate_bias);
  trunk.grad_own = data_of<scalar_t>(gradient);
  trunk.grad_x_local = data_of<scalar_t>(result.streams);
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  for_each_item(trunk.num_tiles(), kernel.backward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.mutual_backward_tile(trunk, tile, scratch); });
  std::vector<GradientItem> items;
  for (int64_t k = 0; k < trunk.num_scenarios; ++k) {
    add_gradient_items(items, GradientItem::Kind::kGate, 0, k, layer.width, kernel.gradient_item_rows);
  }
  for_each_item(static_cast<int64_t>(items.size()), kernel.gradient_scratch(trunk),
                [&](int64_t item, void* scratch) { kernel.gradient_item(trunk, items[item], scratch); });
  return result;
}

}  // namespace

MutualForward mutual_forward_cpu(const MutualInputs& inputs) {
  return inputs.streams.scalar_type() == at::kDouble ? mutual_forward<double>(inputs) : mutual_forward<float>(inputs);
}

MutualBackward mutual_backward_cpu(const MutualInputs& inputs, const at::Tensor& gradient, const MutualForward& kept) {
  return inputs.streams.scalar_type() == at::kDouble ? mutual_backward<double>(inputs, gradient, kept)
                                                     : mutual_backward<float>(inputs, gradient, kept);
}

TrunkForward trunk_forward_cpu(const TrunkInputs& inputs, bool keep, bool recompute, bool all_branches) {
  return inputs.x_local.scalar_type() == at::kDouble ? forward<double>(inputs, keep, recompute, all_branches)
                                                     : forward<float>(inputs, keep, recompute, all_branches);
}

TrunkBackward trunk_backward_cpu(const TrunkInputs& inputs, const at::Tensor& grad_own, const at::Tensor& grad_aux,
                                 at::TensorList scores, at::TensorList kept, bool recompute, bool need_local,
                                 bool need_global) {
  return inputs.x_local.scalar_type() == at::kDouble
             ? backward<double>(inputs, grad_own, grad_aux, scores, kept, recompute, need_local, need_global)
             : backward<float>(inputs, grad_own, grad_aux, scores, kept, recompute, need_local, need_global);
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const Capability* candidate : capabilities()) {
    names.emplace_back(candidate->name);
  }
  return names;
}

}  // namespace saml_kernels
