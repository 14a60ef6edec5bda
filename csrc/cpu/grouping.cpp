// Stable counting sort by scenario. Chunks of rows are counted and placed in parallel; the result is the one stable
// order, whatever the number of threads.

#include "../grouping.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

namespace saml_kernels {
namespace {

// A chunk is long enough to pay for waking a thread; more chunks than this would only add histograms to sum.
constexpr int64_t kRowsPerChunk = 8192;
constexpr int64_t kMaxChunks = 64;

struct Chunks {
  int64_t rows;
  int64_t count;
  int64_t length;

  explicit Chunks(int64_t batch)
      : rows(batch),
        count(std::clamp<int64_t>((batch + kRowsPerChunk - 1) / kRowsPerChunk, 1, kMaxChunks)),
        length((batch + count - 1) / count) {}

  int64_t begin(int64_t chunk) const { return std::min(chunk * length, rows); }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

// Without inverse where it is null.
template <typename id_t>
void group(const at::Tensor& scenario, int64_t num_scenarios, int64_t* permutation, int64_t* inverse,
           int64_t* offsets) {
  const Chunks chunks(scenario.size(0));
  const id_t* ids = scenario.const_data_ptr<id_t>();
  const int64_t stride = scenario.stride(0);

  // cursor[chunk][k] first counts the chunk's rows of scenario k, then becomes the position of the next one.
  std::vector<int64_t> cursor(chunks.count * num_scenarios, 0);
  std::vector<int64_t> first_bad_row(chunks.count, -1);
  at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* counts = cursor.data() + chunk * num_scenarios;
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const int64_t id = ids[row * stride];
        if (id < 0 || id >= num_scenarios) {
          first_bad_row[chunk] = row;
          break;
        }
        ++counts[id];
      }
    }
  });
  for (const int64_t row : first_bad_row) {
    TORCH_CHECK_VALUE(row < 0, "scenario ids must lie in [0, ", num_scenarios, "), but row ", row, " holds ",
                      static_cast<int64_t>(ids[std::max<int64_t>(row, 0) * stride]));
  }

  int64_t position = 0;
  for (int64_t id = 0; id < num_scenarios; ++id) {
    offsets[id] = position;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t count = cursor[chunk * num_scenarios + id];
      cursor[chunk * num_scenarios + id] = position;
      position += count;
    }
  }
  offsets[num_scenarios] = position;

  at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* next = cursor.data() + chunk * num_scenarios;
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const int64_t target = next[ids[row * stride]]++;
        permutation[target] = row;
        if (inverse != nullptr) {
          inverse[row] = target;
        }
      }
    }
  });
}

// (permutation, offsets), and the inverse where there is memory for it.
std::tuple<at::Tensor, at::Tensor> group(const at::Tensor& scenario, int64_t num_scenarios, int64_t* inverse) {
  const auto options = scenario.options().dtype(at::kLong);
  at::Tensor permutation = at::empty({scenario.size(0)}, options);
  at::Tensor offsets = at::empty({num_scenarios + 1}, options);
  AT_DISPATCH_INDEX_TYPES(scenario.scalar_type(), "group_by_scenario", [&] {
    group<index_t>(scenario, num_scenarios, permutation.data_ptr<int64_t>(), inverse, offsets.data_ptr<int64_t>());
  });
  return {permutation, offsets};
}

}  // namespace

Grouping group_by_scenario_cpu(const at::Tensor& scenario, int64_t num_scenarios) {
  check_group_by_scenario(scenario, num_scenarios);
  at::Tensor inverse = at::empty({scenario.size(0)}, scenario.options().dtype(at::kLong));
  auto [permutation, offsets] = group(scenario, num_scenarios, inverse.data_ptr<int64_t>());
  return {permutation, inverse, offsets};
}

GroupingAndCounters group_by_scenario_and_clear_cpu(const at::Tensor& scenario, int64_t num_scenarios,
                                                    int64_t num_counters) {
  check_group_by_scenario(scenario, num_scenarios);
  check_num_counters(num_counters);
  return std::tuple_cat(group(scenario, num_scenarios, nullptr),
                        std::make_tuple(at::zeros({num_counters}, scenario.options().dtype(at::kInt))));
}

}  // namespace saml_kernels
