// The trunk's operators on the CPU: tensors in, tiles handed to the threads, tensors out.

#include "trunk.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

#include "../trunk_spec.h"
#include "dispatch.h"
#include "kept_layouts.h"
#include "kept_memory.h"
#include "shared_tile.h"
#include "weight_layouts.h"
#include "work_items.h"

namespace saml_kernels {
namespace {

// The environment variable is read at every call, so that one process can test every path.
const Capability& capability() {
  const char* wanted = std::getenv("SAML_KERNELS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return *supported_capabilities().front();
  }
  std::string names;
  for (const Capability* candidate : supported_capabilities()) {
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
    return *capability().double_kernels;
  }
}

using ItemFunction = c10::function_ref<void(int64_t item, void* scratch)>;

// function(item, scratch) for items 0 .. count, by all threads, after prepare(scratch) of each. Items are cut into
// `runs`; a thread takes the next one of its run when it is free, then what is left of others.
void for_each_item(int64_t count, int64_t scratch_bytes, ItemFunction function, int64_t runs,
                   c10::function_ref<void(void* scratch)> prepare) {
  if (count == 0) {
    return;
  }
  const auto begin = [&](int64_t run) { return run * count / runs; };
  std::vector<std::atomic<int64_t>> next(static_cast<size_t>(runs));
  for (int64_t run = 0; run < runs; ++run) {
    next[run] = begin(run);
  }
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const c10::DataPtr scratch = KeptMemory::instance().scratch(scratch_bytes);
    prepare(scratch.get());
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t run = (worker + i) % runs;
      for (int64_t item = next[run]++; item < begin(run + 1); item = next[run]++) {
        function(item, scratch.get());
      }
    }
  });
}

void for_each_item(int64_t count, int64_t scratch_bytes, ItemFunction function) {
  for_each_item(count, scratch_bytes, function, 1, [](void*) {});
}

// The tensor as a matrix of its first dimension by all others; without data where it has no elements.
template <typename scalar_t>
MatrixView<const scalar_t> matrix(const at::Tensor& tensor) {
  const int64_t cols = c10::multiply_integers(tensor.sizes().slice(1));
  const bool empty = tensor.numel() == 0;
  return {empty ? nullptr : tensor.const_data_ptr<scalar_t>(), tensor.size(0), cols, empty ? 0 : cols};
}

template <typename scalar_t>
MatrixView<scalar_t> mutable_matrix(const at::Tensor& tensor) {
  const MatrixView<const scalar_t> view = matrix<scalar_t>(tensor);
  return {view.data == nullptr ? nullptr : tensor.mutable_data_ptr<scalar_t>(), view.rows, view.cols, view.ld};
}

template <typename scalar_t>
Storage storage_of(const at::Tensor& tensor) {
  const bool floats = std::is_same_v<scalar_t, float>;
  return floats && tensor.scalar_type() == at::kBFloat16 ? Storage::kBfloat16
         : floats && tensor.scalar_type() == at::kHalf   ? Storage::kFloat16
                                                         : Storage::kComputed;
}

// As matrix(), of a tensor that may stand in 16 bits.
template <typename scalar_t>
StoredMatrix<const scalar_t> stored(const at::Tensor& tensor) {
  const Storage storage = storage_of<scalar_t>(tensor);
  if (storage == Storage::kComputed) {
    return matrix<scalar_t>(tensor);
  }
  const int64_t cols = c10::multiply_integers(tensor.sizes().slice(1));
  const bool empty = tensor.numel() == 0;
  return {empty ? nullptr : tensor.const_data_ptr(), tensor.size(0), cols, empty ? 0 : cols, storage};
}

template <typename scalar_t>
StoredMatrix<scalar_t> mutable_stored(const at::Tensor& tensor) {
  const StoredMatrix<const scalar_t> view = stored<scalar_t>(tensor);
  return {view.data == nullptr ? nullptr : tensor.mutable_data_ptr(), view.rows, view.cols, view.ld, view.storage};
}

// The trunk's description, and ownership of what it points to.
template <typename scalar_t>
struct Problem {
  Trunk<scalar_t> trunk;
  std::vector<Layer<scalar_t>> layers;
  Tensors panels;
  std::vector<std::vector<uint8_t>> panel_states;
  Tensors widened;
};

// (M, K, N) or (K, N), of which the first k1 rows meet the first operand. Biases are widened, unless nothing is read.
template <typename scalar_t>
Weights<scalar_t> weights_of(const at::Tensor& weight, const at::Tensor& bias, int64_t k1, Problem<scalar_t>& problem,
                             bool read = true) {
  const scalar_t* biases = nullptr;
  if (read && bias.numel() > 0) {
    const bool widens = storage_of<scalar_t>(bias) != Storage::kComputed;
    const at::Tensor& floats =
        widens ? problem.widened.emplace_back(bias.to(c10::CppTypeToScalarType<scalar_t>::value)) : bias;
    biases = floats.const_data_ptr<scalar_t>();
  }
  return {.matrices = weight.dim() == 3 ? weight.size(0) : 1,
          .k1 = k1,
          .k2 = weight.size(-2) - k1,
          .n = weight.size(-1),
          .data = stored<scalar_t>(weight).data,
          .storage = storage_of<scalar_t>(weight),
          .bias = biases};
}

// What every trunk has, once its layers are described.
template <typename scalar_t>
void describe_batch(Problem<scalar_t>& problem, int64_t rows, const int64_t* offsets, int64_t num_scenarios) {
  Trunk<scalar_t>& trunk = problem.trunk;
  trunk.rows = rows;
  trunk.num_scenarios = num_scenarios;
  trunk.num_layers = static_cast<int64_t>(problem.layers.size());
  trunk.tiles = row_tiles(rows, kernels<scalar_t>().row_multiples, at::get_num_threads());
  trunk.offsets = offsets;
  trunk.layers = problem.layers.data();
}

template <typename scalar_t>
void describe_batch(Problem<scalar_t>& problem, const at::Tensor& permutation, const at::Tensor& offsets) {
  describe_batch(problem, permutation.size(0), offsets.const_data_ptr<int64_t>(), offsets.size(0) - 1);
  problem.trunk.permutation = permutation.numel() == 0 ? nullptr : permutation.const_data_ptr<int64_t>();
}

// Sums of int8 products stay within 32 bits.
template <typename scalar_t>
void check_terms(const std::vector<Layer<scalar_t>>& layers) {
  TORCH_CHECK_VALUE((std::is_same_v<scalar_t, float>), "int8 foreign streams need float32");
  constexpr int64_t kMostTerms = (int64_t{1} << 31) / (255 * 127);
  for (const Layer<scalar_t>& layer : layers) {
    TORCH_CHECK_VALUE(layer.branch.k() <= kMostTerms, "int8 foreign streams take layers that read up to ", kMostTerms,
                      " values, got one that reads ", layer.branch.k());
  }
}

template <typename scalar_t>
Problem<scalar_t> describe(const TrunkSpec& spec, bool read_weights = true) {
  Problem<scalar_t> problem;
  Trunk<scalar_t>& trunk = problem.trunk;
  problem.layers.resize(spec.branch_weights.size());
  const bool auxiliary = !spec.aux_weights.empty();
  size_t unit = 0;
  int64_t in_width = spec.x_local.size(-1), aux_in = spec.x_global.size(1);
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    layer.in_width = in_width;
    layer.aux_in = aux_in;
    layer.width = in_width = spec.branch_weights[l].size(2);
    layer.aux_width = aux_in = auxiliary ? spec.aux_weights[l].size(1) : 0;
    layer.activation = spec.activations[l];
    layer.branch =
        weights_of<scalar_t>(spec.branch_weights[l], spec.branch_biases[l], layer.in_width, problem, read_weights);
    if (!spec.shared_weights.empty()) {
      layer.branch.storage = Storage::kProduct;
      layer.branch.shared = matrix<scalar_t>(spec.shared_weights[l]).data;
    }
    if (auxiliary) {
      layer.auxiliary =
          weights_of<scalar_t>(spec.aux_weights[l], spec.aux_biases[l], layer.aux_in, problem, read_weights);
    }
    if (std::count(spec.mutual_layers.begin(), spec.mutual_layers.end(), static_cast<int64_t>(l)) > 0) {
      layer.gate_width = spec.gate_weights[unit].size(2);
      layer.gates =
          weights_of<scalar_t>(spec.gate_weights[unit], spec.gate_biases[unit], layer.width, problem, read_weights);
      ++unit;
      trunk.num_shared = static_cast<int64_t>(l) + 1;
    }
  }
  describe_batch(problem, spec.permutation, spec.offsets);
  trunk.score = spec.score;
  trunk.temperature = spec.temperature;
  trunk.per_branch_input = spec.x_local.dim() == 3;
  trunk.own_bfloat16 = spec.own_bfloat16;
  trunk.foreign_rounding = spec.foreign_rounding;
  if (trunk.foreign_rounding == Rounding::kInt8) {
    check_terms(problem.layers);
  }
  trunk.x_local = stored<scalar_t>(spec.x_local);
  trunk.x_global = stored<scalar_t>(spec.x_global);
  trunk.gate_scale = static_cast<scalar_t>(spec.gate_scale);
  if (spec.gated.has_value()) {
    trunk.gated = stored<scalar_t>(*spec.gated);
  }
  return problem;
}

// The mutual unit alone as a trunk: one layer, whose streams are its input.
template <typename scalar_t>
Problem<scalar_t> describe(const MutualSpec& unit) {
  Problem<scalar_t> problem;
  Trunk<scalar_t>& trunk = problem.trunk;
  problem.layers.resize(1);
  Layer<scalar_t>& layer = problem.layers[0];
  layer.width = unit.streams.size(2);
  layer.gate_width = unit.gate_weight.size(2);
  layer.gates = weights_of<scalar_t>(unit.gate_weight, unit.gate_bias, layer.width, problem);
  describe_batch(problem, unit.permutation, unit.offsets);
  trunk.num_shared = 1;
  trunk.score = unit.score;
  trunk.temperature = unit.temperature;
  trunk.per_branch_input = true;
  trunk.own_bfloat16 = unit.bfloat16;
  trunk.foreign_rounding = trunk.own_rounding();
  trunk.streams = matrix<scalar_t>(unit.streams);
  return problem;
}

// Experts as a trunk whose branches all run and all train.
template <typename scalar_t>
Problem<scalar_t> describe(const ExpertsSpec& spec, std::vector<int64_t>& offsets) {
  Problem<scalar_t> problem;
  Trunk<scalar_t>& trunk = problem.trunk;
  problem.layers.resize(spec.weights.size());
  int64_t in_width = spec.x.size(1);
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    Layer<scalar_t>& layer = problem.layers[l];
    layer.in_width = in_width;
    layer.width = in_width = spec.weights[l].size(2);
    layer.activation = spec.activations[l];
    layer.branch = weights_of<scalar_t>(spec.weights[l], spec.biases[l], layer.in_width, problem);
  }
  const int64_t experts = spec.weights[0].size(0), rows = spec.x.size(0);
  for (int64_t k = 0; k <= experts; ++k) {
    offsets.push_back(k * rows);
  }
  describe_batch(problem, rows, offsets.data(), experts);
  trunk.num_shared = trunk.num_layers;
  trunk.all_branches = trunk.experts = true;
  trunk.own_bfloat16 = spec.bfloat16;
  trunk.foreign_rounding = trunk.own_rounding();
  trunk.x_local = stored<scalar_t>(spec.x);
  return problem;
}

// Memory of laid out weights: the call's own, or what is kept of these parameters.
template <typename scalar_t>
class LayoutMemory {
 public:
  LayoutMemory(Problem<scalar_t>& problem, const void* kernels, const Tensors& parameters)
      : problem_(problem), kernels_(kernels) {
    std::copy_if(parameters.begin(), parameters.end(), std::back_inserter(parameters_),
                 [](const at::Tensor& weight) { return KeptLayouts::instance().wants(weight); });
  }

  // Of a product there are two tensors to watch: its layouts are not kept.
  bool keeps(const Weights<scalar_t>& weights) const {
    return weights.storage != Storage::kProduct && parameter(weights) != nullptr;
  }

  template <typename element_t>
  bool find(const Weights<scalar_t>& weights, int64_t kind, int64_t count, element_t*& panels) {
    const at::Tensor found = KeptLayouts::instance().find(*parameter(weights), {kernels_, kind, count});
    if (found.defined()) {
      panels = hold<element_t>(found);
    }
    return found.defined();
  }

  template <typename element_t>
  void allocate(const Weights<scalar_t>& weights, int64_t kind, int64_t count, element_t*& panels) {
    constexpr at::ScalarType type = std::is_same_v<element_t, uint16_t> ? at::kBFloat16
                                    : std::is_same_v<element_t, int8_t> ? at::kChar
                                                                        : c10::CppTypeToScalarType<scalar_t>::value;
    const at::Tensor made = fresh({count}, type);
    panels = hold<element_t>(made);
    if (const at::Tensor* weight = parameter(weights)) {
      made_.push_back({*weight, {kernels_, kind, count}, made});
    }
  }

  uint8_t* states(int64_t count) {
    return problem_.panel_states.emplace_back(static_cast<size_t>(count), kNotLaidOut).data();
  }

  // Once everything is laid out.
  void keep() const {
    for (const auto& [weight, layout, panels] : made_) {
      KeptLayouts::instance().keep(weight, layout, panels);
    }
  }

 private:
  struct Made {
    at::Tensor weight;
    LayoutKey layout;
    at::Tensor panels;
  };

  template <typename element_t>
  element_t* hold(const at::Tensor& panels) {
    problem_.panels.push_back(panels);
    return static_cast<element_t*>(panels.mutable_data_ptr());
  }

  const at::Tensor* parameter(const Weights<scalar_t>& weights) const {
    const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                    [&](const at::Tensor& weight) { return weight.const_data_ptr() == weights.data; });
    return found == parameters_.end() ? nullptr : &*found;
  }

  Problem<scalar_t>& problem_;
  const void* kernels_;
  Tensors parameters_;
  std::vector<Made> made_;
};

// parameters: those whose layouts may be kept.
template <typename scalar_t>
void lay_out_weights(Problem<scalar_t>& problem, const TrunkKernels<scalar_t>& kernel, Readers readers,
                     const Tensors& parameters = {}) {
  LayoutMemory<scalar_t> memory(problem, &kernel, parameters);
  const std::vector<PanelItem<scalar_t>> items =
      make_layouts(problem.trunk, problem.layers, kernel, readers, at::get_num_threads(), memory);
  for_each_item(static_cast<int64_t>(items.size()), 1, [&](int64_t item, void*) { kernel.lay_out(items[item]); });
  memory.keep();
}

// Parameters whose layouts may be kept: those of a call that saves nothing for backward.
Tensors kept_parameters(bool save, std::initializer_list<const Tensors*> lists) {
  Tensors parameters;
  for (const Tensors* list : lists) {
    parameters.insert(parameters.end(), list->begin(), save ? list->begin() : list->end());
  }
  return parameters;
}

// As what a layer saves for backward, and dZ, stand in memory: where products take bfloat16 factors in these.
template <typename scalar_t>
at::ScalarType saved_type(const Trunk<scalar_t>& trunk) {
  return trunk.own_bfloat16 ? at::kBFloat16 : c10::CppTypeToScalarType<scalar_t>::value;
}

// A tensor for the matrix, in its place.
template <typename scalar_t>
at::Tensor make_saved(const Trunk<scalar_t>& trunk, const SavedMatrix<scalar_t>& matrix, at::IntArrayRef shape) {
  const at::ScalarType type = matrix.stored != nullptr ? saved_type(trunk) : c10::CppTypeToScalarType<scalar_t>::value;
  const at::Tensor made = fresh(shape, type);
  if (matrix.stored != nullptr) {
    *matrix.stored = mutable_stored<scalar_t>(made);
  } else {
    *matrix.preact = mutable_matrix<scalar_t>(made);
  }
  return made;
}

template <typename scalar_t>
void read_saved(const SavedMatrix<const scalar_t>& matrix, const at::Tensor& tensor) {
  if (matrix.stored != nullptr) {
    *matrix.stored = stored<scalar_t>(tensor);
  } else {
    *matrix.preact = saml_kernels::matrix<scalar_t>(tensor);
  }
}

template <typename element_t>
at::DimVector shape_of(const SavedMatrix<element_t>& matrix, int64_t rows) {
  return matrix.branches > 0 ? at::DimVector{rows, matrix.branches, matrix.width} : at::DimVector{rows, matrix.width};
}

// Bytes of the largest cache that a core reaches; 0 where the system does not tell. Not what sysconf says, which counts
// those of all cores.
int64_t largest_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t size = 0;
    char unit = 0;
    if (!(file >> size >> unit)) {
      return int64_t{0};
    }
    return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : 0;
  }();
  return bytes;
}

// Says of weights that are read once in a call whether caches keep them until the next call. Where they do not, reading
// them need not push out what does come again, such as the caller's own program.
template <typename scalar_t>
void mark_passing(Problem<scalar_t>& problem) {
  const Trunk<scalar_t>& trunk = problem.trunk;
  int64_t bytes = 0;
  const auto add = [&](const Weights<scalar_t>& weights, bool all) {
    bytes += (all ? weights.matrices : std::min(trunk.rows, weights.matrices)) * weights.k() * weights.n *
             weights.matrix(0).element_size();
  };
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    const Layer<scalar_t>& layer = problem.layers[l];
    add(layer.branch, l < trunk.num_shared);
    add(layer.auxiliary, true);
    add(layer.gates, l + 1 < trunk.num_shared);
  }
  if (largest_cache() == 0 || bytes <= largest_cache()) {
    return;
  }
  for (Layer<scalar_t>& layer : problem.layers) {
    layer.branch.passing = layer.auxiliary.passing = layer.gates.passing = true;
  }
}

// Of one tile with all rows; layers of own branches alone read no more matrices than there are rows.
template <typename scalar_t>
bool has_products_to_share(const Trunk<scalar_t>& trunk) {
  for (int64_t l = 0; l < trunk.num_layers && trunk.rows > 0; ++l) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    const int64_t own = std::min(trunk.rows, trunk.num_scenarios);
    if (worth_sharing(trunk.rows, l < trunk.num_shared ? trunk.num_scenarios : own, layer.branch) ||
        worth_sharing(trunk.rows, 1, layer.auxiliary) ||
        worth_sharing(trunk.rows, l + 1 < trunk.num_shared ? trunk.num_scenarios : own, layer.gates)) {
      return true;
    }
  }
  return false;
}

template <typename scalar_t>
TrunkForwardResults trunk_forward(const TrunkForwardArguments& arguments) {
  Problem<scalar_t> problem = describe<scalar_t>(arguments.trunk);
  Trunk<scalar_t>& trunk = problem.trunk;
  if (arguments.all_branches) {
    trunk.all_branches = true;
    trunk.num_shared = trunk.num_layers;
  }
  if (trunk.rows <= kRowsWithoutPacking && !arguments.save) {
    mark_passing(problem);
  }
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  const int64_t threads = at::get_num_threads();
  // Tiles for every thread would be so small that reading the weights takes their time: one tile, computed by all.
  SharedTile shared;
  if (threads > 1 && trunk.rows <= kMostTileRows) {
    trunk.tiles.count = std::min<int64_t>(trunk.tiles.count, 1);
    trunk.team = has_products_to_share(trunk) ? shared.team(threads) : Team{};
  }
  const auto callers = arguments.trunk.x_local.options();
  const auto options = callers.dtype(c10::CppTypeToScalarType<scalar_t>::value);
  TrunkForwardResults result;
  std::vector<Saved<scalar_t>> saved(problem.layers.size());
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    const Layer<scalar_t>& layer = problem.layers[l];
    for (const auto& matrix : saved_matrices(saved[l], layer, trunk.num_scenarios, arguments.recompute)) {
      if (arguments.save && matrix.wanted) {
        Tensors& list = matrix.factor ? result.factors : result.saved;
        list.push_back(make_saved(trunk, matrix, shape_of(matrix, trunk.rows)));
      }
    }
    if (layer.has_mutual_unit()) {
      result.scores.push_back(fresh({trunk.rows, trunk.num_scenarios}, options));
      saved[l].alpha = mutable_matrix<scalar_t>(result.scores.back());
    }
  }
  const LayerShape& last = problem.layers.back();
  result.own = arguments.all_branches ? fresh({trunk.rows, trunk.num_scenarios, last.width}, callers)
                                      : fresh({trunk.rows, last.width}, callers);
  result.aux = fresh({trunk.rows, last.aux_width}, callers);
  const ForwardPass<scalar_t> pass{trunk, saved.data(), mutable_stored<scalar_t>(result.own),
                                   mutable_stored<scalar_t>(result.aux)};
  const TrunkSpec& spec = arguments.trunk;
  lay_out_weights(problem, kernel, {.forward = true, .dgrad = false},
                  kept_parameters(arguments.save, {&spec.branch_weights, &spec.aux_weights, &spec.gate_weights}));
  const int64_t scratch_bytes = kernel.forward_scratch(trunk);
  if (trunk.team.workers > 1) {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      shared.compute([&] {
        const c10::DataPtr scratch = KeptMemory::instance().scratch(scratch_bytes);
        kernel.forward_tile(pass, 0, scratch.get());
      });
    });
    return result;
  }
  for_each_item(trunk.num_tiles(), scratch_bytes,
                [&](int64_t tile, void* scratch) { kernel.forward_tile(pass, tile, scratch); });
  return result;
}

// Gradients like these parameters.
template <typename scalar_t>
ParameterGradient gradient_of(const at::Tensor& weight, const at::Tensor& bias, Tensors& weights, Tensors& biases) {
  weights.push_back(fresh(weight.sizes(), weight.options()));
  biases.push_back(fresh(bias.sizes(), bias.options()));
  return {mutable_stored<scalar_t>(weights.back()).data, mutable_stored<scalar_t>(biases.back()).data,
          storage_of<scalar_t>(weight)};
}

template <typename scalar_t>
void run_gradient_items(const BackwardPass<scalar_t>& pass, const TrunkKernels<scalar_t>& kernel, bool gates_only) {
  const int64_t rows = rows_of_item(pass.trunk, kernel, at::get_num_threads());
  const std::vector<GradientItem> items = gradient_items(pass.trunk, rows, gates_only);
  for_each_item(static_cast<int64_t>(items.size()), kernel.gradient_scratch(pass.trunk),
                [&](int64_t item, void* scratch) { kernel.gradient_item(pass, items[item], scratch); });
}

template <typename scalar_t>
TrunkBackwardResults trunk_backward(const TrunkBackwardArguments& arguments) {
  const TrunkSpec& spec = arguments.trunk;
  Problem<scalar_t> problem = describe<scalar_t>(spec);
  const Trunk<scalar_t>& trunk = problem.trunk;
  const auto callers = spec.x_local.options();
  TrunkBackwardResults result;
  const auto preact_gradient = [&](int64_t width) {
    result.preact_gradients.push_back(fresh({trunk.rows, width}, saved_type(trunk)));
    return mutable_stored<scalar_t>(result.preact_gradients.back());
  };
  std::vector<Saved<const scalar_t>> saved(problem.layers.size());
  std::vector<LayerGradients<scalar_t>> gradients(problem.layers.size());
  size_t next_factor = 0, next_saved = 0, unit = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    const Layer<scalar_t>& layer = problem.layers[l];
    for (const auto& read : saved_matrices(saved[l], layer, trunk.num_scenarios, arguments.recompute)) {
      if (read.wanted) {
        read_saved<scalar_t>(read, read.factor ? arguments.factors[next_factor++] : arguments.saved[next_saved++]);
      }
    }
    gradients[l].dz = preact_gradient(layer.width);
    if (layer.aux_width > 0) {
      gradients[l].dz_aux = preact_gradient(layer.aux_width);
    }
    if (layer.has_mutual_unit()) {
      saved[l].alpha = matrix<scalar_t>(arguments.scores[unit++]);
      gradients[l].dz_gate = preact_gradient(layer.gate_width);
    }
  }
  result.x_local = fresh({0}, callers);
  result.x_global = fresh({0}, callers);
  result.gated = spec.gated.has_value() ? fresh(spec.gated->sizes(), callers) : fresh({0}, callers);
  BackwardPass<scalar_t> pass{.trunk = trunk,
                              .saved = saved.data(),
                              .gradients = gradients.data(),
                              .grad_own = stored<scalar_t>(arguments.grad_own),
                              .grad_aux = stored<scalar_t>(arguments.grad_aux),
                              .grad_gated = mutable_stored<scalar_t>(result.gated)};
  if (arguments.need_local) {
    // Foreign views of a per-branch input receive nothing.
    result.x_local =
        trunk.per_branch_input ? at::zeros(spec.x_local.sizes(), callers) : fresh(spec.x_local.sizes(), callers);
    pass.grad_x_local = mutable_stored<scalar_t>(result.x_local);
  }
  if (arguments.need_global) {
    const bool read = problem.layers[0].aux_width > 0;
    result.x_global = read ? fresh(spec.x_global.sizes(), callers) : at::zeros(spec.x_global.sizes(), callers);
    pass.grad_x_global = read ? mutable_stored<scalar_t>(result.x_global) : StoredMatrix<scalar_t>();
  }
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  lay_out_weights(problem, kernel, {.forward = arguments.recompute, .dgrad = true});
  // What a thread lays out of a scenario's weights serves the tiles that follow.
  const bool by_threads = std::any_of(problem.layers.begin(), problem.layers.end(), [](const Layer<scalar_t>& layer) {
    return layer.branch.transposed_by_threads || layer.gates.transposed_by_threads;
  });
  for_each_item(
      trunk.num_tiles(), kernel.backward_scratch(pass),
      [&](int64_t tile, void* scratch) { kernel.backward_tile(pass, tile, scratch); },
      by_threads ? at::get_num_threads() : 1, [&](void* scratch) { kernel.begin_backward(pass, scratch); });
  return result;
}

// From G = d(W_t ∘ S), in its place dW_t = G ∘ S, and dS = Σ_t G ∘ W_t.
template <typename scalar_t>
void split_gradient(const at::Tensor& gradient, const at::Tensor& weight, const at::Tensor& shared,
                    const at::Tensor& shared_gradient) {
  constexpr int64_t kElements = 2048;
  const int64_t scenarios = weight.size(0), size = shared.numel();
  const scalar_t *own = weight.const_data_ptr<scalar_t>(), *factor = shared.const_data_ptr<scalar_t>();
  scalar_t *gradients = gradient.mutable_data_ptr<scalar_t>(), *sum = shared_gradient.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, (size + kElements - 1) / kElements, 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kElements; begin < std::min(last * kElements, size); begin += kElements) {
      const int64_t count = std::min(kElements, size - begin);
      // The factors' copy cannot overlap what is written, so that the loop below vectorises.
      scalar_t sums[kElements] = {}, factors[kElements];
      std::copy_n(factor + begin, count, factors);
      for (int64_t t = 0; t < scenarios; ++t) {
        const scalar_t* w = own + t * size + begin;
        scalar_t* g = gradients + t * size + begin;
        for (int64_t i = 0; i < count; ++i) {
          sums[i] += g[i] * w[i];
          g[i] *= factors[i];
        }
      }
      std::copy_n(sums, count, sum + begin);
    }
  });
}

template <typename scalar_t>
TrunkWeightGradientsResults trunk_weight_gradients(const TrunkWeightGradientsArguments& arguments) {
  const TrunkSpec& spec = arguments.trunk;
  const Problem<scalar_t> problem = describe<scalar_t>(spec, false);
  const Trunk<scalar_t>& trunk = problem.trunk;
  TrunkWeightGradientsResults result;
  std::vector<Saved<const scalar_t>> saved(problem.layers.size());
  std::vector<LayerGradients<scalar_t>> gradients(problem.layers.size());
  size_t next_factor = 0, next_gradient = 0, unit = 0;
  const auto preact_gradient = [&] { return mutable_stored<scalar_t>(arguments.preact_gradients[next_gradient++]); };
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    const Layer<scalar_t>& layer = problem.layers[l];
    for (const auto& read : saved_matrices(saved[l], layer, trunk.num_scenarios, false)) {
      if (read.wanted && read.factor) {
        read_saved<scalar_t>(read, arguments.factors[next_factor++]);
      }
    }
    gradients[l].dz = preact_gradient();
    gradients[l].branch = gradient_of<scalar_t>(spec.branch_weights[l], spec.branch_biases[l], result.branch_weights,
                                                result.branch_biases);
    if (layer.aux_width > 0) {
      gradients[l].dz_aux = preact_gradient();
      gradients[l].auxiliary =
          gradient_of<scalar_t>(spec.aux_weights[l], spec.aux_biases[l], result.aux_weights, result.aux_biases);
    }
    if (layer.has_mutual_unit()) {
      gradients[l].dz_gate = preact_gradient();
      gradients[l].gates = gradient_of<scalar_t>(spec.gate_weights[unit], spec.gate_biases[unit], result.gate_weights,
                                                 result.gate_biases);
      ++unit;
    }
  }
  const BackwardPass<scalar_t> pass{.trunk = trunk, .saved = saved.data(), .gradients = gradients.data()};
  run_gradient_items(pass, kernels<scalar_t>(), false);
  for (size_t l = 0; l < spec.shared_weights.size(); ++l) {
    const at::Tensor& shared = spec.shared_weights[l];
    result.shared_weights.push_back(fresh(shared.sizes(), shared.options()));
    split_gradient<scalar_t>(result.branch_weights[l], spec.branch_weights[l], shared, result.shared_weights.back());
  }
  return result;
}

template <typename scalar_t>
MutualForwardResults mutual_forward(const MutualSpec& unit) {
  const Problem<scalar_t> problem = describe<scalar_t>(unit);
  const Trunk<scalar_t>& trunk = problem.trunk;
  const LayerShape& layer = problem.layers[0];
  const auto options = unit.streams.options();
  MutualForwardResults result{
      fresh({trunk.rows, layer.width}, options), fresh({trunk.rows, trunk.num_scenarios}, options),
      fresh({trunk.rows, layer.width}, options), fresh({trunk.rows, layer.gate_width}, options)};
  const Saved<scalar_t> saved{.own = mutable_matrix<scalar_t>(result.own),
                              .gate = mutable_matrix<scalar_t>(result.gate),
                              .alpha = mutable_matrix<scalar_t>(result.scores)};
  const ForwardPass<scalar_t> pass{.trunk = trunk, .saved = &saved, .own = mutable_matrix<scalar_t>(result.mutual)};
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  for_each_item(trunk.num_tiles(), kernel.forward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.mutual_forward_tile(pass, tile, scratch); });
  return result;
}

template <typename scalar_t>
MutualBackwardResults mutual_backward(const MutualBackwardArguments& arguments) {
  const MutualSpec& unit = arguments.unit;
  const Problem<scalar_t> problem = describe<scalar_t>(unit);
  const Trunk<scalar_t>& trunk = problem.trunk;
  const auto options = unit.streams.options();
  const at::Tensor gate_preact = fresh({trunk.rows, problem.layers[0].gate_width}, options);
  // Foreign streams receive nothing.
  MutualBackwardResults result{at::zeros(unit.streams.sizes(), options),
                               fresh(unit.gate_weight.sizes(), unit.gate_weight.options()),
                               fresh(unit.gate_bias.sizes(), unit.gate_bias.options())};
  const Saved<const scalar_t> saved{.own = matrix<scalar_t>(arguments.own),
                                    .gate = matrix<scalar_t>(arguments.gate),
                                    .alpha = matrix<scalar_t>(arguments.scores)};
  const LayerGradients<scalar_t> gradients{
      .dz_gate = mutable_matrix<scalar_t>(gate_preact),
      .gates = {mutable_stored<scalar_t>(result.gate_weight).data, mutable_stored<scalar_t>(result.gate_bias).data,
                storage_of<scalar_t>(unit.gate_weight)}};
  const BackwardPass<scalar_t> pass{.trunk = trunk,
                                    .saved = &saved,
                                    .gradients = &gradients,
                                    .grad_own = matrix<scalar_t>(arguments.gradient),
                                    .grad_x_local = mutable_matrix<scalar_t>(result.streams)};
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  for_each_item(trunk.num_tiles(), kernel.backward_scratch(pass),
                [&](int64_t tile, void* scratch) { kernel.mutual_backward_tile(pass, tile, scratch); });
  run_gradient_items(pass, kernel, true);
  return result;
}

template <typename scalar_t>
ExpertsForwardResults experts_forward(const ExpertsForwardArguments& arguments) {
  std::vector<int64_t> offsets;
  Problem<scalar_t> problem = describe<scalar_t>(arguments.experts, offsets);
  const Trunk<scalar_t>& trunk = problem.trunk;
  const auto callers = arguments.experts.x.options();
  ExpertsForwardResults result{fresh({trunk.rows, trunk.num_scenarios, problem.layers.back().width}, callers), {}};
  std::vector<Saved<scalar_t>> saved(problem.layers.size());
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    for (const auto& matrix : saved_of_experts(saved[l], problem.layers[l], l + 1 == problem.layers.size())) {
      if (arguments.save && matrix.wanted) {
        result.saved.push_back(make_saved(trunk, matrix, {offsets.back(), matrix.width}));
      }
    }
  }
  const ForwardPass<scalar_t> pass{.trunk = trunk, .saved = saved.data(), .own = mutable_stored<scalar_t>(result.out)};
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  lay_out_weights(problem, kernel, {.forward = true, .dgrad = false},
                  kept_parameters(arguments.save, {&arguments.experts.weights}));
  for_each_item(trunk.num_tiles(), kernel.experts_forward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.experts_forward_tile(pass, tile, scratch); });
  return result;
}

template <typename scalar_t>
ExpertsBackwardResults experts_backward(const ExpertsBackwardArguments& arguments) {
  const ExpertsSpec& spec = arguments.experts;
  std::vector<int64_t> offsets;
  Problem<scalar_t> problem = describe<scalar_t>(spec, offsets);
  const Trunk<scalar_t>& trunk = problem.trunk;
  const auto callers = spec.x.options();
  Tensors preact_gradients;
  std::vector<Saved<const scalar_t>> saved(problem.layers.size());
  std::vector<LayerGradients<scalar_t>> gradients(problem.layers.size());
  size_t next = 0;
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    for (const auto& read : saved_of_experts(saved[l], problem.layers[l], l + 1 == problem.layers.size())) {
      if (read.wanted) {
        read_saved<scalar_t>(read, arguments.saved[next++]);
      }
    }
    preact_gradients.push_back(fresh({offsets.back(), problem.layers[l].width}, saved_type(trunk)));
    gradients[l].dz = mutable_stored<scalar_t>(preact_gradients.back());
  }
  ExpertsBackwardResults result{fresh({0}, callers), {}, {}};
  BackwardPass<scalar_t> pass{.trunk = trunk,
                              .saved = saved.data(),
                              .gradients = gradients.data(),
                              .grad_own = stored<scalar_t>(arguments.gradient),
                              .out = stored<scalar_t>(arguments.out)};
  if (arguments.need_input) {
    result.x = fresh(spec.x.sizes(), callers);
    pass.grad_x_local = mutable_stored<scalar_t>(result.x);
  }
  const TrunkKernels<scalar_t>& kernel = kernels<scalar_t>();
  lay_out_weights(problem, kernel, {.forward = false, .dgrad = true});
  for_each_item(trunk.num_tiles(), kernel.experts_backward_scratch(trunk),
                [&](int64_t tile, void* scratch) { kernel.experts_backward_tile(pass, tile, scratch); });
  problem.panels.clear();
  for (size_t l = 0; l < problem.layers.size(); ++l) {
    gradients[l].branch = gradient_of<scalar_t>(spec.weights[l], spec.biases[l], result.weights, result.biases);
  }
  run_gradient_items(pass, kernel, false);
  return result;
}

}  // namespace

void keep_layouts(bool keep) {
  if (keep) {
    KeptLayouts::instance().begin();
  } else {
    KeptLayouts::instance().end();
  }
}

int64_t release_memory() { return KeptMemory::instance().release(); }

TrunkForwardResults trunk_forward_cpu(const TrunkForwardArguments& arguments) {
  TORCH_CHECK_VALUE(!arguments.all_branches || arguments.trunk.mutual_layers.empty(),
                    "all_branches excludes mutual layers");
  const TrunkSpec& trunk = arguments.trunk;
  TORCH_CHECK_VALUE(trunk.shared_weights.empty() || trunk.shared_weights.size() == trunk.branch_weights.size(),
                    "shared_weights must be none or one a layer: ", trunk.branch_weights.size(), ", got ",
                    trunk.shared_weights.size());
  for (size_t l = 0; l < trunk.shared_weights.size(); ++l) {
    const at::Tensor &shared = trunk.shared_weights[l], &own = trunk.branch_weights[l];
    TORCH_CHECK_VALUE(shared.scalar_type() == own.scalar_type() && storage_of<float>(own) == Storage::kComputed &&
                          shared.sizes() == own.sizes().slice(1),
                      "shared_weights must be float32 or float64 as the branches' and of their shape without the "
                      "first dimension");
  }
  TORCH_CHECK_VALUE(!trunk.gated.has_value() || (!arguments.all_branches && trunk.mutual_layers.empty() &&
                                                 trunk.activations.back() == Activation::kIdentity),
                    "gated needs an identity after the last layer and excludes all_branches and mutual layers");
  return arguments.trunk.x_local.scalar_type() == at::kDouble ? trunk_forward<double>(arguments)
                                                              : trunk_forward<float>(arguments);
}

TrunkBackwardResults trunk_backward_cpu(const TrunkBackwardArguments& arguments) {
  return arguments.trunk.x_local.scalar_type() == at::kDouble ? trunk_backward<double>(arguments)
                                                              : trunk_backward<float>(arguments);
}

TrunkWeightGradientsResults trunk_weight_gradients_cpu(const TrunkWeightGradientsArguments& arguments) {
  return arguments.trunk.x_local.scalar_type() == at::kDouble ? trunk_weight_gradients<double>(arguments)
                                                              : trunk_weight_gradients<float>(arguments);
}

MutualForwardResults mutual_forward_cpu(const MutualSpec& unit) {
  return unit.streams.scalar_type() == at::kDouble ? mutual_forward<double>(unit) : mutual_forward<float>(unit);
}

MutualBackwardResults mutual_backward_cpu(const MutualBackwardArguments& arguments) {
  return arguments.unit.streams.scalar_type() == at::kDouble ? mutual_backward<double>(arguments)
                                                             : mutual_backward<float>(arguments);
}

ExpertsForwardResults experts_forward_cpu(const ExpertsForwardArguments& arguments) {
  return arguments.experts.x.scalar_type() == at::kDouble ? experts_forward<double>(arguments)
                                                          : experts_forward<float>(arguments);
}

ExpertsBackwardResults experts_backward_cpu(const ExpertsBackwardArguments& arguments) {
  return arguments.experts.x.scalar_type() == at::kDouble ? experts_backward<double>(arguments)
                                                          : experts_backward<float>(arguments);
}

}  // namespace saml_kernels
