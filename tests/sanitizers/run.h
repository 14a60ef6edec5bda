// One trunk, or its mutual unit alone, with one capability's kernels: as trunk.cpp describes it, without tensors.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cases.h"
#include "guarded.h"
#include "shared_tile.h"
#include "trunk.h"
#include "work_items.h"

namespace saml_kernels {

struct Variant {
  int threads;
  bool save;
  bool recompute;
  bool laid_out;
  bool input_gradients;
  bool by_tiles = false;  // where they can, tiles lay panels out as they come to them, and threads transposes
};

// On threads that the sanitizer knows.
template <typename Function>
void on_threads(int threads, const Function& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(work);
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}

// As for_each_item in trunk.cpp.
template <typename Function, typename Prepare = decltype([](void*) {})>
void for_each_item(int64_t count, int64_t scratch_bytes, int threads, const Function& function,
                   const Prepare& prepare = {}) {
  std::atomic<int64_t> next{0};
  on_threads(threads, [&] {
    const Guarded<char> scratch(scratch_bytes);
    prepare(scratch.data());
    for (int64_t item = next++; item < count; item = next++) {
      function(item, scratch.data());
    }
  });
}

using Result = std::pair<std::string, std::vector<double>>;

template <typename scalar_t>
class Run {
 public:
  Run(const Case& problem, const Variant& variant, const TrunkKernels<scalar_t>& kernel)
      : case_(problem), variant_(variant), kernel_(kernel), random_(1) {}

  std::vector<Result> trunk() {
    describe_trunk();
    lay_out();
    run_trunk_forward();
    if (variant_.save) {
      run_trunk_backward();
    }
    return results();
  }

  // As many experts as there are scenarios.
  std::vector<Result> experts() {
    describe_experts();
    lay_out();
    run_experts_forward();
    if (variant_.save) {
      run_experts_backward();
    }
    return results();
  }

  // The mutual unit alone on streams of the first width.
  std::vector<Result> mutual_unit() {
    describe_mutual_unit();
    run_mutual_forward();
    run_mutual_backward();
    return results();
  }

 private:
  using Matrix = MatrixView<scalar_t>;

  static Matrix view(const Guarded<scalar_t>& buffer, int64_t rows, int64_t cols) {
    return {buffer.data(), rows, cols, buffer.data() == nullptr ? 0 : cols};
  }

  Matrix unset(int64_t rows, int64_t cols) { return view(memory_.emplace_back(rows * cols), rows, cols); }

  // As what a layer saves stands in memory.
  StoredMatrix<scalar_t> unset_saved(int64_t rows, int64_t cols) {
    if (!trunk_.own_bfloat16) {
      return unset(rows, cols);
    }
    const Guarded<uint16_t>& buffer = bfloat16_memory_.emplace_back(rows * cols);
    return {buffer.data(), rows, cols, buffer.data() == nullptr ? 0 : cols, Storage::kBfloat16};
  }

  void save(const SavedMatrix<scalar_t>& matrix, int64_t rows) {
    if (!variant_.save || !matrix.wanted) {
      return;
    }
    const int64_t cols = std::max<int64_t>(matrix.branches, 1) * matrix.width;
    if (matrix.stored != nullptr) {
      *matrix.stored = unset_saved(rows, cols);
    } else {
      *matrix.preact = unset(rows, cols);
    }
  }

  Matrix normal(int64_t rows, int64_t cols, double scale, double mean = 0) {
    const Guarded<scalar_t>& buffer = memory_.emplace_back(rows * cols);
    std::normal_distribution<double> distribution(mean, scale);
    std::generate(buffer.begin(), buffer.end(), [&] { return static_cast<scalar_t>(distribution(random_)); });
    return view(buffer, rows, cols);
  }

  // What is compared afterwards.
  Matrix output(const std::string& name, int64_t rows, int64_t cols) {
    outputs_.emplace_back(name, memory_.size());
    return unset(rows, cols);
  }

  Matrix zero_output(const std::string& name, int64_t rows, int64_t cols) {
    const Matrix matrix = output(name, rows, cols);
    std::fill(memory_.back().begin(), memory_.back().end(), scalar_t(0));
    return matrix;
  }

  ParameterGradient gradient_output(const std::string& name, const Weights<scalar_t>& weights) {
    scalar_t* weight = output("grad " + name + "weight", weights.matrices * weights.k(), weights.n).data;
    return {weight, output("grad " + name + "bias", weights.matrices, weights.n).data};
  }

  Weights<scalar_t> weights(int64_t matrices, int64_t k1, int64_t k2, int64_t n) {
    const double scale = 1 / std::sqrt(std::max<double>(1, static_cast<double>(k1 + k2)));
    const scalar_t* data = normal(matrices * (k1 + k2), n, scale).data;
    return {.matrices = matrices, .k1 = k1, .k2 = k2, .n = n, .data = data, .bias = normal(matrices, n, 0.3, 0.5).data};
  }

  Weights<scalar_t> gates(int64_t width, int64_t gate_width) { return weights(case_.scenarios, width, 0, gate_width); }

  // Scenario 1 has no rows, where there is one; the first has most.
  void group() {
    const int64_t m = case_.scenarios, rows = case_.rows;
    std::vector<int64_t> sizes(m, 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t k = r % 3 == 0 ? (r / 3) % m : 0;
      ++sizes[k == 1 ? m - 1 : k];
    }
    int64_t* offset = offsets_.begin();
    *offset = 0;
    for (int64_t k = 0; k < m; ++k) {
      offset[k + 1] = offset[k] + sizes[k];
    }
    for (int64_t r = 0; r < rows; ++r) {
      permutation_.begin()[r] = r;
    }
    std::shuffle(permutation_.begin(), permutation_.end(), random_);
    trunk_.permutation = permutation_.data();
    trunk_.offsets = offsets_.data();
  }

  void describe_batch() {
    trunk_.rows = case_.rows;
    trunk_.num_scenarios = case_.scenarios;
    trunk_.num_layers = static_cast<int64_t>(layers_.size());
    const int64_t tile_rows = std::clamp<int64_t>((case_.rows / 16 + 11) / 12 * 12, 12, 96);
    trunk_.tiles = {case_.rows, 12, (case_.rows + tile_rows - 1) / tile_rows};
    trunk_.score = case_.options.score;
    trunk_.temperature = 0.1;
    trunk_.layers = layers_.data();
    saved_.resize(layers_.size());
    read_.resize(layers_.size());
    gradients_.resize(layers_.size());
  }

  void describe_trunk() {
    const int64_t m = case_.scenarios;
    group();
    layers_.resize(case_.widths.size());
    int64_t in_width = case_.local, aux_in = case_.global;
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer<scalar_t>& layer = layers_[l];
      layer.in_width = in_width;
      layer.aux_in = aux_in;
      layer.width = in_width = case_.widths[l];
      layer.aux_width = aux_in = case_.aux_widths[l];
      layer.activation = case_.options.activation;
      layer.branch = weights(m, layer.in_width, layer.aux_width, layer.width);
      if (layer.aux_width > 0) {
        layer.auxiliary = weights(1, layer.aux_in, 0, layer.aux_width);
      }
      if (std::count(case_.mutual.begin(), case_.mutual.end(), static_cast<int64_t>(l)) > 0) {
        layer.gate_width = case_.options.scalar_gate ? 1 : layer.width;
        layer.gates = gates(layer.width, layer.gate_width);
        trunk_.num_shared = static_cast<int64_t>(l) + 1;
      }
    }
    describe_batch();
    trunk_.per_branch_input = case_.options.per_branch;
    trunk_.own_bfloat16 = case_.options.own_bfloat16;
    trunk_.foreign_rounding = case_.options.foreign_rounding;
    trunk_.x_local = normal(case_.rows, (case_.options.per_branch ? m : 1) * case_.local, 1);
    trunk_.x_global = normal(case_.rows, case_.global, 1);
    if (case_.options.gate) {
      layers_.back().activation = Activation::kIdentity;
      trunk_.gated = normal(case_.rows, layers_.back().width, 1);
      trunk_.gate_scale = 2;
    }
  }

  void describe_experts() {
    layers_.resize(case_.widths.size());
    int64_t in_width = case_.local;
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer<scalar_t>& layer = layers_[l];
      layer.in_width = in_width;
      layer.width = in_width = case_.widths[l];
      layer.activation = case_.options.activation;
      layer.branch = weights(case_.scenarios, layer.in_width, 0, layer.width);
    }
    describe_batch();
    trunk_.num_shared = trunk_.num_layers;
    trunk_.all_branches = trunk_.experts = true;
    trunk_.own_bfloat16 = case_.options.own_bfloat16;
    trunk_.foreign_rounding = trunk_.own_rounding();
    for (int64_t k = 0; k <= case_.scenarios; ++k) {
      offsets_.begin()[k] = k * case_.rows;
    }
    trunk_.offsets = offsets_.data();
    trunk_.x_local = normal(case_.rows, case_.local, 1);
  }

  void describe_mutual_unit() {
    group();
    layers_.resize(1);
    Layer<scalar_t>& layer = layers_[0];
    layer.width = case_.widths[0];
    layer.gate_width = case_.options.scalar_gate ? 1 : layer.width;
    layer.gates = gates(layer.width, layer.gate_width);
    describe_batch();
    trunk_.num_shared = 1;
    trunk_.per_branch_input = true;
    trunk_.own_bfloat16 = case_.options.own_bfloat16;
    trunk_.foreign_rounding = trunk_.own_rounding();
    trunk_.streams = normal(case_.rows, case_.scenarios * layer.width, 1, 0.7);
  }

  // Every layout that this capability's products read, or only those that they cannot do without.
  void lay_out() {
    const bool int8 = trunk_.foreign_rounding == Rounding::kInt8;
    if (!variant_.laid_out && !int8) {
      return;
    }
    std::vector<PanelItem<scalar_t>> items;
    const auto add = [&](Weights<scalar_t>& weights) {
      if (weights.matrices == 0) {
        return;
      }
      if (int8) {
        weights.int8_panels.first =
            int8_memory_.emplace_back(weights.matrices * kernel_.int8_panels_size(weights)).data();
      }
      for (int64_t i = 0; i < weights.matrices; ++i) {
        items.push_back({&weights, i});
      }
      if (!variant_.laid_out) {
        return;
      }
      const Layouts& layouts = kernel_.layouts;
      weights.parts = layouts.float_parts && !trunk_.own_bfloat16 ? 3 : 1;
      const auto states = [&](const Weights<scalar_t>& of) {
        return variant_.by_tiles ? states_.emplace_back(of.matrices * of.n, kNotLaidOut).data() : nullptr;
      };
      const auto bfloat16 = [&](int64_t size) { return bfloat16_memory_.emplace_back(weights.matrices * size).data(); };
      if (!layouts.float_parts) {
        weights.panels.first = unset(weights.matrices, kernel_.panels_size(weights)).data;
        weights.panels.states = states(weights);
      }
      const bool transposed_units = layouts.float_parts || (layouts.bfloat16 && trunk_.own_bfloat16);
      if (trunk_.experts && !transposed_units) {
        weights.transposed_panels.first = unset(weights.matrices, kernel_.transposed_float_panels_size(weights)).data;
      }
      if (!layouts.bfloat16 && std::max(trunk_.own_rounding(), trunk_.foreign_rounding) == Rounding::kBfloat16) {
        weights.rounded_panels.first = unset(weights.matrices, kernel_.panels_size(weights)).data;
      }
      if (layouts.bfloat16) {
        weights.bfloat16_panels.first = bfloat16(kernel_.bfloat16_panels_size(weights));
        weights.bfloat16_panels.states = layouts.float_parts ? nullptr : states(weights);
      }
      weights.transposed_by_threads =
          variant_.by_tiles && transposed_units && !layouts.float_parts && !trunk_.experts && weights.matrices > 1;
      if (transposed_units && !weights.transposed_by_threads) {
        weights.transposed_bfloat16_panels.first = bfloat16(kernel_.transposed_panels_size(weights));
      }
    };
    for (Layer<scalar_t>& layer : layers_) {
      add(layer.branch);
      add(layer.auxiliary);
      add(layer.gates);
    }
    for_each_item(static_cast<int64_t>(items.size()), 1, variant_.threads,
                  [&](int64_t item, void*) { kernel_.lay_out(items[item]); });
  }

  void run_trunk_forward() {
    const int64_t rows = case_.rows, m = case_.scenarios;
    for (size_t l = 0; l < layers_.size(); ++l) {
      if (layers_[l].has_mutual_unit()) {
        saved_[l].alpha = output("alpha", rows, m);
      }
      for (const auto& matrix : saved_matrices(saved_[l], layers_[l], m, variant_.recompute)) {
        save(matrix, rows);
      }
      read_back(l);
    }
    const LayerShape& last = layers_.back();
    const Matrix own = output("own", rows, last.width);
    const Matrix aux = output("aux", rows, last.aux_width);
    if (variant_.threads > 1 && rows > 0 && rows <= 96) {
      SharedTile shared;
      Trunk<scalar_t> trunk = trunk_;
      trunk.tiles.count = 1;
      trunk.team = shared.team(variant_.threads);
      const ForwardPass<scalar_t> pass{trunk, saved_.data(), own, aux};
      on_threads(variant_.threads, [&] {
        shared.compute([&] {
          const Guarded<char> scratch(kernel_.forward_scratch(trunk));
          kernel_.forward_tile(pass, 0, scratch.data());
        });
      });
      return;
    }
    const ForwardPass<scalar_t> pass{trunk_, saved_.data(), own, aux};
    for_each_item(trunk_.num_tiles(), kernel_.forward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.forward_tile(pass, tile, scratch); });
  }

  void run_trunk_backward() {
    const int64_t rows = case_.rows;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer<scalar_t>& layer = layers_[l];
      LayerGradients<scalar_t>& gradients = gradients_[l];
      gradients.dz = unset_saved(rows, layer.width);
      gradients.dz_aux = unset_saved(rows, layer.aux_width);
      gradients.dz_gate = unset_saved(rows, layer.gate_width);
      gradients.branch = gradient_output("", layer.branch);
      if (layer.aux_width > 0) {
        gradients.auxiliary = gradient_output("aux ", layer.auxiliary);
      }
      if (layer.has_mutual_unit()) {
        gradients.gates = gradient_output("gate ", layer.gates);
      }
    }
    BackwardPass<scalar_t> pass{trunk_, read_.data(), gradients_.data()};
    pass.grad_own = normal(rows, layers_.back().width, 1);
    pass.grad_aux = normal(rows, layers_.back().aux_width, 1);
    if (case_.options.gate) {
      pass.grad_gated = output("grad gated", rows, layers_.back().width);
    }
    if (variant_.input_gradients) {
      const int64_t width = (case_.options.per_branch ? case_.scenarios : 1) * case_.local;
      pass.grad_x_local =
          case_.options.per_branch ? zero_output("grad x_local", rows, width) : output("grad x_local", rows, width);
      if (layers_[0].aux_width > 0) {
        pass.grad_x_global = output("grad x_global", rows, case_.global);
      }
    }
    for_each_item(
        trunk_.num_tiles(), kernel_.backward_scratch(pass), variant_.threads,
        [&](int64_t tile, void* scratch) { kernel_.backward_tile(pass, tile, scratch); },
        [&](void* scratch) { kernel_.begin_backward(pass, scratch); });
    run_gradient_items(pass, false);
  }

  void run_experts_forward() {
    const int64_t rows = case_.rows, m = case_.scenarios;
    for (size_t l = 0; l < layers_.size(); ++l) {
      for (const auto& matrix : saved_of_experts(saved_[l], layers_[l], l + 1 == layers_.size())) {
        save(matrix, m * rows);
      }
      read_back(l);
    }
    const ForwardPass<scalar_t> pass{trunk_, saved_.data(), output("out", rows, m * layers_.back().width)};
    for_each_item(trunk_.num_tiles(), kernel_.experts_forward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.experts_forward_tile(pass, tile, scratch); });
    read_.back().own = pass.own.view();
  }

  void run_experts_backward() {
    const int64_t rows = case_.rows, m = case_.scenarios;
    for (size_t l = 0; l < layers_.size(); ++l) {
      gradients_[l].dz = unset_saved(m * rows, layers_[l].width);
      gradients_[l].branch = gradient_output("", layers_[l].branch);
    }
    BackwardPass<scalar_t> pass{trunk_, read_.data(), gradients_.data()};
    pass.grad_own = normal(rows, m * layers_.back().width, 1);
    pass.out = read_.back().own;
    if (variant_.input_gradients) {
      pass.grad_x_local = output("grad x", rows, case_.local);
    }
    for_each_item(trunk_.num_tiles(), kernel_.experts_backward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.experts_backward_tile(pass, tile, scratch); });
    run_gradient_items(pass, false);
  }

  void run_mutual_forward() {
    const int64_t rows = case_.rows;
    const ForwardPass<scalar_t> pass{trunk_, saved_.data(), output("mutual", rows, layers_[0].width)};
    saved_[0].alpha = output("alpha", rows, case_.scenarios);
    saved_[0].own = unset(rows, layers_[0].width);
    saved_[0].gate = unset(rows, layers_[0].gate_width);
    read_back(0);
    for_each_item(trunk_.num_tiles(), kernel_.forward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.mutual_forward_tile(pass, tile, scratch); });
  }

  void run_mutual_backward() {
    const int64_t rows = case_.rows, width = layers_[0].width;
    gradients_[0].dz_gate = unset(rows, layers_[0].gate_width);
    gradients_[0].gates = gradient_output("gate ", layers_[0].gates);
    BackwardPass<scalar_t> pass{trunk_, read_.data(), gradients_.data()};
    pass.grad_own = normal(rows, width, 1);
    pass.grad_x_local = zero_output("grad streams", rows, case_.scenarios * width);
    for_each_item(trunk_.num_tiles(), kernel_.backward_scratch(pass), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.mutual_backward_tile(pass, tile, scratch); });
    run_gradient_items(pass, true);
  }

  void run_gradient_items(const BackwardPass<scalar_t>& pass, bool gates_only) {
    const std::vector<GradientItem> items = gradient_items(trunk_, kernel_.gradient_item_rows, gates_only);
    for_each_item(static_cast<int64_t>(items.size()), kernel_.gradient_scratch(pass.trunk), variant_.threads,
                  [&](int64_t item, void* scratch) { kernel_.gradient_item(pass, items[item], scratch); });
  }

  // What forward saves of a layer, as backward reads it.
  void read_back(size_t l) {
    const Saved<scalar_t>& s = saved_[l];
    read_[l] = {s.own, s.own_preact, s.mutual, s.aux, s.aux_preact, s.streams, s.gate, s.alpha};
  }

  std::vector<Result> results() const {
    // Whoever takes a panel lays it out, and says so.
    double unfinished = 0;
    for (const std::vector<uint8_t>& states : states_) {
      unfinished += static_cast<double>(std::count(states.begin(), states.end(), kBeingLaidOut));
    }
    std::vector<Result> values{{"the number of panels that are still being laid out", {unfinished}}};
    for (const auto& [name, index] : outputs_) {
      values.emplace_back(name, std::vector<double>(memory_[index].begin(), memory_[index].end()));
    }
    return values;
  }

  const Case& case_;
  const Variant& variant_;
  const TrunkKernels<scalar_t>& kernel_;
  std::mt19937_64 random_;
  Trunk<scalar_t> trunk_;
  std::vector<Layer<scalar_t>> layers_;
  std::vector<Saved<scalar_t>> saved_;
  std::vector<Saved<const scalar_t>> read_;
  std::vector<LayerGradients<scalar_t>> gradients_;
  std::vector<Guarded<scalar_t>> memory_;
  std::vector<Guarded<uint16_t>> bfloat16_memory_;
  std::vector<Guarded<int8_t>> int8_memory_;
  std::vector<std::vector<uint8_t>> states_;
  Guarded<int64_t> permutation_{case_.rows};
  Guarded<int64_t> offsets_{case_.scenarios + 1};
  std::vector<std::pair<std::string, size_t>> outputs_;
};

}  // namespace saml_kernels
