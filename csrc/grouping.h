// Grouping a batch by scenario: the first step of every kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace saml_kernels {

// (permutation, inverse, offsets), all int64. permutation (B,) lists the rows stably sorted by scenario, inverse (B,)
// undoes it, and the rows of scenario k stand at offsets[k] .. offsets[k + 1] of the sorted order; offsets is (M + 1,).
using Grouping = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// (permutation, offsets, counters): without the inverse, and with (num_counters,) int32 zeros. A kernel that hands out
// work by counters needs them cleared before it starts; cleared here they cost no launch of their own.
using GroupingAndCounters = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// scenario: (B,) int32 or int64, any stride. TypeError or ValueError for anything else, and for an id outside [0, M).
Grouping group_by_scenario_cpu(const at::Tensor& scenario, int64_t num_scenarios);

// ValueError besides for num_counters < 0.
GroupingAndCounters group_by_scenario_and_clear_cpu(const at::Tensor& scenario, int64_t num_scenarios,
                                                    int64_t num_counters);

// Checks shared by the CPU and the CUDA kernel: everything that needs no look at the ids.
void check_group_by_scenario(const at::Tensor& scenario, int64_t num_scenarios);
void check_num_counters(int64_t num_counters);

}  // namespace saml_kernels
