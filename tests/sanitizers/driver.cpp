// Runs every function of every instruction set's kernels on odd shapes, in memory that ends where it should, on one
// thread and on several. A sanitizer judges the accesses; the driver itself compares the results: the same bits for
// any number of threads, with streams kept or computed again, with weights laid out or not; no NaN although all memory
// starts as NaN; close to the baseline instruction set.

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "trunk.h"

namespace saml_kernels {
namespace {

// count elements that end at a page nobody may touch: any instruction that runs past them faults, also those that the
// sanitizer does not instrument (masked loads). AddressSanitizer watches the bytes in front of them.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    const size_t body = (size + page - 1) / page * page;
    mapped_ = body + page;
    void* block = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED || mprotect(static_cast<char*>(block) + body, page, PROT_NONE) != 0) {
      std::perror("driver: no memory");
      std::exit(2);
    }
    block_ = static_cast<char*>(block);
    data_ = reinterpret_cast<T*>(block_ + (body - size));
    std::memset(data_, 0xff, size);  // NaN
    ASAN_POISON_MEMORY_REGION(block_, body - size);
  }
  ~Guarded() {
    if (block_ != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(block_, mapped_);
      munmap(block_, mapped_);
    }
  }
  Guarded(Guarded&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)),
        data_(other.data_),
        count_(other.count_),
        mapped_(other.mapped_) {}
  Guarded& operator=(Guarded&&) = delete;

  // As trunk.cpp passes tensors on: null without elements.
  T* data() const { return count_ == 0 ? nullptr : data_; }
  int64_t size() const { return count_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  char* block_;
  T* data_;
  int64_t count_;
  size_t mapped_;
};

struct Case {
  const char* name;
  int64_t scenarios;
  int64_t rows;
  int64_t local;
  int64_t global;
  std::vector<int64_t> widths;
  std::vector<int64_t> aux_widths;  // all 0: a grouped MLP
  std::vector<int64_t> mutual;      // counted from 0
  bool scalar_gate;
  Score score;
  Activation activation;
  bool per_branch;
  bool own_bfloat16;
  bool foreign_bfloat16;
};

struct Variant {
  int threads;
  bool keep;
  bool recompute;
  bool laid_out;
  bool input_gradients;
};

// As for_each_item in trunk.cpp, on threads that the sanitizer knows.
template <typename Function>
void for_each_item(int64_t count, int64_t scratch_bytes, int threads, const Function& function) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const Guarded<char> scratch(scratch_bytes);
    for (int64_t item = next++; item < count; item = next++) {
      function(item, scratch.data());
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(work);
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}

using Result = std::pair<std::string, std::vector<double>>;

template <typename scalar_t>
class Run {
 public:
  Run(const Case& problem, const Variant& variant, const TrunkKernels<scalar_t>& kernel)
      : case_(problem), variant_(variant), kernel_(kernel), random_(1) {}

  std::vector<Result> trunk() {
    describe();
    lay_out();
    describe_outputs();
    for_each_item(trunk_.num_tiles(), kernel_.forward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.forward_tile(trunk_, tile, scratch); });
    if (variant_.keep) {
      describe_gradients();
      for_each_item(trunk_.num_tiles(), kernel_.backward_scratch(trunk_), variant_.threads,
                    [&](int64_t tile, void* scratch) { kernel_.backward_tile(trunk_, tile, scratch); });
      run_gradient_items(false);
    }
    return results();
  }

  // The mutual unit alone on streams of the first width.
  std::vector<Result> mutual_unit() {
    describe_mutual_unit();
    for_each_item(trunk_.num_tiles(), kernel_.forward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.mutual_forward_tile(trunk_, tile, scratch); });
    describe_mutual_gradients();
    for_each_item(trunk_.num_tiles(), kernel_.backward_scratch(trunk_), variant_.threads,
                  [&](int64_t tile, void* scratch) { kernel_.mutual_backward_tile(trunk_, tile, scratch); });
    run_gradient_items(true);
    return results();
  }

 private:
  scalar_t* unset(int64_t count) { return memory_.emplace_back(count).data(); }

  scalar_t* normal(int64_t count, double scale, double mean = 0) {
    const Guarded<scalar_t>& buffer = memory_.emplace_back(count);
    std::normal_distribution<double> distribution(mean, scale);
    std::generate(buffer.begin(), buffer.end(), [&] { return static_cast<scalar_t>(distribution(random_)); });
    return buffer.data();
  }

  scalar_t* zeros(int64_t count) {
    const Guarded<scalar_t>& buffer = memory_.emplace_back(count);
    std::fill(buffer.begin(), buffer.end(), scalar_t(0));
    return buffer.data();
  }

  // What is compared afterwards.
  scalar_t* output(const char* name, int64_t count) {
    outputs_.emplace_back(name, memory_.size());
    return unset(count);
  }

  scalar_t* zero_output(const char* name, int64_t count) {
    outputs_.emplace_back(name, memory_.size());
    return zeros(count);
  }

  Weights<scalar_t> weights(int64_t matrices, int64_t k1, int64_t k2, int64_t n) {
    const double scale = 1 / std::sqrt(std::max<double>(1, static_cast<double>(k1 + k2)));
    scalar_t* data = normal(matrices * (k1 + k2) * n, scale);
    return {matrices, k1, k2, n, data, normal(matrices * n, 0.3, 0.5), nullptr, nullptr, nullptr, 1};
  }

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

  void describe() {
    const int64_t m = case_.scenarios;
    group();
    layers_.resize(case_.widths.size());
    int64_t in_width = case_.local, aux_in = case_.global;
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer<scalar_t>& layer = layers_[l];
      layer = {};
      layer.in_width = in_width;
      layer.aux_in = aux_in;
      layer.width = in_width = case_.widths[l];
      layer.aux_width = aux_in = case_.aux_widths[l];
      layer.activation = case_.activation;
      layer.branch = weights(m, layer.in_width, layer.aux_width, layer.width);
      if (layer.aux_width > 0) {
        layer.aux_net = weights(1, layer.aux_in, 0, layer.aux_width);
      }
      if (std::count(case_.mutual.begin(), case_.mutual.end(), static_cast<int64_t>(l)) > 0) {
        layer.gate_width = case_.scalar_gate ? 1 : layer.width;
        layer.gates = weights(m, layer.width, 0, layer.gate_width);
        trunk_.num_shared = static_cast<int64_t>(l) + 1;
      }
    }
    set_common();
    trunk_.x_local = normal(case_.rows * (case_.per_branch ? m : 1) * case_.local, 1);
    trunk_.x_global = normal(case_.rows * case_.global, 1);
  }

  void set_common() {
    trunk_.rows = case_.rows;
    trunk_.num_scenarios = case_.scenarios;
    trunk_.num_layers = static_cast<int64_t>(layers_.size());
    trunk_.tile_rows = std::clamp<int64_t>((case_.rows / 16 + 11) / 12 * 12, 12, 96);
    trunk_.score = case_.score;
    trunk_.temperature = 0.1;
    trunk_.per_branch_input = case_.per_branch;
    trunk_.own_bfloat16 = case_.own_bfloat16;
    trunk_.foreign_bfloat16 = case_.foreign_bfloat16;
    trunk_.layers = layers_.data();
  }

  static int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

  void lay_out() {
    if (!variant_.laid_out) {
      return;
    }
    std::vector<PanelItem<scalar_t>> items;
    const auto add = [&](Weights<scalar_t>& weights) {
      if (weights.matrices == 0) {
        return;
      }
      const Layouts& layouts = kernel_.layouts;
      weights.parts = layouts.float_parts && !case_.own_bfloat16 ? 3 : 1;
      const auto bfloat16 = [&](int64_t size) { return bfloat16_memory_.emplace_back(weights.matrices * size).data(); };
      if (!layouts.float_parts) {
        weights.panels = unset(weights.matrices * kernel_.panels_size(weights));
      }
      if (layouts.bfloat16) {
        weights.bfloat16_panels = bfloat16(kernel_.bfloat16_panels_size(weights));
      }
      if (layouts.transposed) {
        weights.transposed_bfloat16_panels = bfloat16(kernel_.transposed_panels_size(weights));
      }
      for (int64_t i = 0; i < weights.matrices; ++i) {
        items.push_back({&weights, i});
      }
    };
    for (Layer<scalar_t>& layer : layers_) {
      add(layer.branch);
      add(layer.aux_net);
      add(layer.gates);
    }
    for_each_item(static_cast<int64_t>(items.size()), 1, variant_.threads,
                  [&](int64_t item, void*) { kernel_.lay_out(items[item]); });
  }

  void describe_outputs() {
    const int64_t rows = case_.rows, m = case_.scenarios;
    for (Layer<scalar_t>& layer : layers_) {
      const bool argument = derivative_needs_argument(layer.activation), mutual = layer.has_mutual_unit();
      if (mutual) {
        layer.alpha = output("alpha", rows * m);
      }
      if (!variant_.keep) {
        continue;
      }
      layer.own = unset(rows * layer.width);
      layer.own_argument = argument ? unset(rows * layer.width) : nullptr;
      layer.mutual = mutual ? unset(rows * layer.width) : nullptr;
      layer.aux = unset(rows * layer.aux_width);
      layer.aux_argument = argument ? unset(rows * layer.aux_width) : nullptr;
      layer.streams = mutual && !variant_.recompute ? unset(rows * m * layer.width) : nullptr;
      layer.gate = mutual ? unset(rows * layer.gate_width) : nullptr;
    }
    trunk_.out_own = output("own", rows * layers_.back().width);
    trunk_.out_aux = output("aux", rows * layers_.back().aux_width);
  }

  void describe_gradients() {
    const int64_t rows = case_.rows, m = case_.scenarios;
    for (Layer<scalar_t>& layer : layers_) {
      layer.grad_argument = unset(rows * layer.width);
      layer.grad_aux_argument = unset(rows * layer.aux_width);
      layer.grad_gate_argument = unset(rows * layer.gate_width);
      layer.grad_weight = output("grad weight", m * layer.branch.k() * layer.width);
      layer.grad_bias = output("grad bias", m * layer.width);
      if (layer.aux_width > 0) {
        layer.grad_aux_weight = output("grad aux weight", layer.aux_in * layer.aux_width);
        layer.grad_aux_bias = output("grad aux bias", layer.aux_width);
      }
      if (layer.has_mutual_unit()) {
        layer.grad_gate_weight = output("grad gate weight", m * layer.width * layer.gate_width);
        layer.grad_gate_bias = output("grad gate bias", m * layer.gate_width);
      }
    }
    trunk_.grad_own = normal(rows * layers_.back().width, 1);
    trunk_.grad_aux = normal(rows * layers_.back().aux_width, 1);
    if (variant_.input_gradients) {
      const int64_t count = rows * (case_.per_branch ? m : 1) * case_.local;
      trunk_.grad_x_local = case_.per_branch ? zero_output("grad x_local", count) : output("grad x_local", count);
      trunk_.grad_x_global = layers_[0].aux_width > 0 ? output("grad x_global", rows * case_.global) : nullptr;
    }
  }

  void describe_mutual_unit() {
    const int64_t m = case_.scenarios, rows = case_.rows;
    group();
    layers_.resize(1);
    Layer<scalar_t>& layer = layers_[0];
    layer = {};
    layer.width = case_.widths[0];
    layer.gate_width = case_.scalar_gate ? 1 : layer.width;
    layer.activation = Activation::kIdentity;
    layer.gates = weights(m, layer.width, 0, layer.gate_width);
    layer.streams = normal(rows * m * layer.width, 1, 0.7);
    trunk_.num_shared = 1;
    set_common();
    trunk_.per_branch_input = false;
    trunk_.foreign_bfloat16 = trunk_.own_bfloat16;
    trunk_.out_own = output("mutual", rows * layer.width);
    layer.alpha = output("alpha", rows * m);
    layer.own = unset(rows * layer.width);
    layer.gate = unset(rows * layer.gate_width);
  }

  void describe_mutual_gradients() {
    const int64_t m = case_.scenarios, rows = case_.rows;
    Layer<scalar_t>& layer = layers_[0];
    layer.grad_gate_argument = unset(rows * layer.gate_width);
    layer.grad_gate_weight = output("grad gate weight", m * layer.width * layer.gate_width);
    layer.grad_gate_bias = output("grad gate bias", m * layer.gate_width);
    trunk_.grad_own = normal(rows * layer.width, 1);
    trunk_.grad_x_local = zero_output("grad streams", rows * m * layer.width);
  }

  void run_gradient_items(bool gates_only) {
    using Kind = GradientItem::Kind;
    std::vector<GradientItem> items;
    const auto add = [&](Kind kind, int64_t layer, int64_t scenario, int64_t height) {
      const int64_t step = kernel_.gradient_item_rows;
      for (int64_t begin = 0; begin == 0 || begin < height; begin += step) {
        items.push_back({kind, layer, scenario, begin, std::min(begin + step, height)});
      }
    };
    for (int64_t l = 0; l < trunk_.num_layers; ++l) {
      const Layer<scalar_t>& layer = layers_[l];
      if (!gates_only && layer.aux_width > 0) {
        add(Kind::kAux, l, 0, layer.aux_in);
      }
      for (int64_t k = 0; k < trunk_.num_scenarios; ++k) {
        if (!gates_only) {
          add(Kind::kBranch, l, k, layer.in_width + layer.aux_width);
        }
        if (layer.has_mutual_unit()) {
          add(Kind::kGate, l, k, layer.width);
        }
      }
    }
    for_each_item(static_cast<int64_t>(items.size()), kernel_.gradient_scratch(trunk_), variant_.threads,
                  [&](int64_t item, void* scratch) { kernel_.gradient_item(trunk_, items[item], scratch); });
  }

  std::vector<Result> results() const {
    std::vector<Result> values;
    for (const auto& [name, index] : outputs_) {
      values.emplace_back(name, std::vector<double>(memory_[index].begin(), memory_[index].end()));
    }
    return values;
  }

  const Case& case_;
  const Variant& variant_;
  const TrunkKernels<scalar_t>& kernel_;
  std::mt19937_64 random_;
  Trunk<scalar_t> trunk_{};
  std::vector<Layer<scalar_t>> layers_;
  std::vector<Guarded<scalar_t>> memory_;
  std::vector<Guarded<uint16_t>> bfloat16_memory_;
  Guarded<int64_t> permutation_{case_.rows};
  Guarded<int64_t> offsets_{case_.scenarios + 1};
  std::vector<std::pair<const char*, size_t>> outputs_;
};

int failures = 0;

void fail(const std::string& where, const std::string& what) {
  std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
  ++failures;
}

void check_no_nan(const std::string& where, const std::vector<Result>& results) {
  for (const auto& [name, values] : results) {
    if (!std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); })) {
      fail(where, name + " holds a value that is not finite");
    }
  }
}

// Every result that both have; one without gradients has fewer.
void check_same_bits(const std::string& where, const std::vector<Result>& results,
                     const std::vector<Result>& expected) {
  for (size_t i = 0; i < std::min(results.size(), expected.size()); ++i) {
    if (results[i].second != expected[i].second) {
      fail(where, results[i].first + " differs");
    }
  }
}

void check_close(const std::string& where, const std::vector<Result>& results, const std::vector<Result>& expected,
                 double tolerance) {
  for (size_t i = 0; i < std::min(results.size(), expected.size()); ++i) {
    double distance = 0, norm = 0;
    for (size_t j = 0; j < expected[i].second.size(); ++j) {
      distance += std::pow(results[i].second[j] - expected[i].second[j], 2);
      norm += std::pow(expected[i].second[j], 2);
    }
    if (!(std::sqrt(distance) <= tolerance * std::max(std::sqrt(norm), 1e-3))) {
      fail(where, results[i].first + " is " + std::to_string(std::sqrt(distance / norm)) + " from the baseline's");
    }
  }
}

std::vector<Case> cases() {
  std::vector<Case> list;
  constexpr auto kRatio = Score::kRatio, kSoftmax = Score::kSoftmax;
  list.push_back(
      {"one scenario", 1, 40, 5, 3, {17, 33}, {9, 1}, {0}, false, kRatio, Activation::kRelu, false, false, false});
  list.push_back({"one row", 3, 1, 1, 1, {1, 1}, {1, 1}, {0}, false, kSoftmax, Activation::kGelu, true, false, false});
  list.push_back(
      {"no rows", 2, 0, 4, 4, {5, 3}, {2, 2}, {0, 1}, false, kRatio, Activation::kSilu, false, false, false});
  list.push_back(
      {"views", 2, 101, 33, 5, {33, 47}, {47, 17}, {1}, false, kRatio, Activation::kLeakyRelu, true, false, false});
  list.push_back({"two tables",
                  3,
                  61,
                  4,
                  5,
                  {47, 17, 1},
                  {17, 1, 33},
                  {0, 1},
                  true,
                  kSoftmax,
                  Activation::kGelu,
                  false,
                  false,
                  false});
  list.push_back({"three tables",
                  4,
                  61,
                  4,
                  5,
                  {16, 33, 17},
                  {32, 17, 1},
                  {0, 1, 2},
                  false,
                  kSoftmax,
                  Activation::kSilu,
                  true,
                  false,
                  false});
  list.push_back({"a layer between",
                  3,
                  61,
                  4,
                  5,
                  {33, 70, 47},
                  {17, 33, 5},
                  {0, 2},
                  false,
                  kRatio,
                  Activation::kTanh,
                  false,
                  false,
                  false});
  list.push_back({"many scenarios",
                  64,
                  130,
                  4,
                  5,
                  {17, 8},
                  {5, 6},
                  {0},
                  false,
                  kRatio,
                  Activation::kIdentity,
                  false,
                  false,
                  false});
  list.push_back(
      {"many tables", 33, 13, 4, 5, {7, 5}, {5, 6}, {0, 1}, false, kSoftmax, Activation::kRelu, false, false, false});
  list.push_back(
      {"no mutual unit", 7, 100, 47, 9, {17, 16}, {33, 32}, {}, false, kRatio, Activation::kTanh, false, false, false});
  list.push_back(
      {"grouped", 5, 100, 47, 0, {100, 31}, {0, 0}, {}, false, kRatio, Activation::kRelu, false, false, false});
  list.push_back(
      {"no local", 2, 50, 0, 7, {9, 5}, {110, 3}, {0}, false, kRatio, Activation::kRelu, false, false, false});
  list.push_back(
      {"no local views", 2, 50, 0, 7, {9, 5}, {110, 3}, {0, 1}, true, kRatio, Activation::kRelu, true, false, false});
  list.push_back(
      {"no global", 2, 50, 7, 0, {9, 5}, {11, 3}, {1}, false, kRatio, Activation::kRelu, false, false, false});
  list.push_back(
      {"wide", 1, 600, 65, 100, {65, 130}, {47, 98}, {0}, false, kRatio, Activation::kRelu, false, false, false});
  list.push_back(
      {"wide scalar", 2, 300, 200, 13, {16, 3}, {5, 200}, {0}, true, kSoftmax, Activation::kRelu, false, false, false});
  return list;
}

template <typename scalar_t>
const TrunkKernels<scalar_t>& kernels_of(const Capability& capability) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return capability.float_kernels;
  } else {
    return capability.double_kernels;
  }
}

template <typename scalar_t>
void check_case(const Case& problem, const Capability& capability, bool threads_only, const std::string& where) {
  constexpr int threads = 4;
  const bool rounded = problem.own_bfloat16 || problem.foreign_bfloat16;
  const auto run = [&](const Variant& variant, const Capability& of) {
    return Run<scalar_t>(problem, variant, kernels_of<scalar_t>(of)).trunk();
  };
  const auto unit = [&](const Variant& variant, const Capability& of) {
    return Run<scalar_t>(problem, variant, kernels_of<scalar_t>(of)).mutual_unit();
  };
  const Variant plain{1, true, false, true, true}, parallel{threads, true, false, true, true};
  const std::vector<Result> expected = run(plain, capability), alone = unit(plain, capability);
  check_same_bits(where + ", threads", run(parallel, capability), expected);
  check_same_bits(where + ", mutual unit on threads", unit(parallel, capability), alone);
  check_same_bits(where + ", recomputed on threads", run({threads, true, true, true, true}, capability), expected);
  if (threads_only) {
    return;
  }
  check_no_nan(where, expected);
  check_no_nan(where + ", mutual unit", alone);
  // A value beside a rounding boundary may fall to either side; of bfloat16 trunks some capabilities round in backward.
  const double tolerance = problem.own_bfloat16              ? 3e-2
                           : rounded                         ? 1e-2
                           : std::is_same_v<scalar_t, float> ? 1e-4
                                                             : 1e-10;
  check_close(where, expected, run(plain, kBaseline), tolerance);
  check_close(where + ", mutual unit", alone, unit(plain, kBaseline), tolerance);
  const std::pair<const char*, Variant> variants[] = {
      {"not laid out", {threads, true, false, false, true}},
      {"recomputed, not laid out", {1, true, true, false, true}},
      {"nothing kept", {threads, false, false, true, true}},
      {"nothing kept, not laid out", {1, false, false, false, true}},
      {"parameters only", {threads, true, false, true, false}},
  };
  // Products of parts round differently from products of floats.
  const bool same_products = !kernels_of<scalar_t>(capability).layouts.float_parts;
  for (const auto& [name, variant] : variants) {
    if (variant.laid_out || same_products) {
      check_same_bits(where + ", " + name, run(variant, capability), expected);
    } else {
      check_close(where + ", " + name, run(variant, capability), expected, tolerance);
    }
  }
}

std::vector<const Capability*> capabilities() {
  std::vector<const Capability*> list = {&kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    list.push_back(&kAvx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    list.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx512bf16")) {
      list.push_back(&kAvx512Bf16);
#if defined(__linux__)
      constexpr long kRequestComponentPermission = 0x1023, kTileData = 18;
      if (__builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestComponentPermission, kTileData) == 0) {
        list.push_back(&kAmx);
      }
#endif
    }
  }
#endif
  return list;
}

}  // namespace
}  // namespace saml_kernels

// "threads" checks only what differs between one thread and several: enough for ThreadSanitizer, which is slow.
int main(int count, char** arguments) {
  using namespace saml_kernels;
  const bool threads_only = count > 1 && std::string(arguments[1]) == "threads";
  int checked = 0;
  for (const Capability* capability : capabilities()) {
    for (const Case& original : cases()) {
      const std::string where = std::string(capability->name) + ", " + original.name;
      check_case<float>(original, *capability, threads_only, where + ", float");
      Case rounded = original;
      rounded.foreign_bfloat16 = true;
      check_case<float>(rounded, *capability, threads_only, where + ", foreign bfloat16");
      checked += 2;
      if (threads_only) {
        continue;
      }
      rounded.own_bfloat16 = true;
      check_case<float>(rounded, *capability, threads_only, where + ", bfloat16");
      check_case<double>(original, *capability, threads_only, where + ", double");
      checked += 2;
    }
    std::printf("%s done\n", capability->name);
    std::fflush(stdout);
  }
  std::printf("%d cases, %d failures\n", checked, failures);
  return failures == 0 ? 0 : 1;
}
