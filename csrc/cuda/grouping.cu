// Stable counting sort by scenario in one launch of one block: every warp owns a run of consecutive rows, counts its
// scenarios, and after one prefix sum over (scenario, warp) places its rows. No atomics: the order is the stable one.
// The same launch clears counters for the kernel that reads the grouping next.

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDADeviceAssertion.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../grouping.h"

namespace saml_kernels {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// What every architecture grants a block without opting in.
constexpr int64_t kSharedBytes = 48 * 1024;
// One block keeps one multiprocessor busy; beyond this a device-wide sort is the better launch.
constexpr int64_t kMaxRows = 1 << 17;

// Lanes of the warp that hold the same scenario as this one; lanes past the end hold -1.
__device__ unsigned lanes_with_same_id(int id) { return __match_any_sync(kFullWarp, id); }

template <typename id_t>
__device__ int load_id(const id_t* ids, int64_t stride, int row, int end, int num_scenarios) {
  if (row >= end) {
    return -1;
  }
  const int64_t id = ids[row * stride];
  CUDA_KERNEL_ASSERT(id >= 0 && id < num_scenarios && "scenario ids must lie in [0, num_scenarios)");
  return static_cast<int>(id);
}

// The inverse is not written where it is null.
// One block an SM is all there will be: with less than that said, ptxas saves registers and spills.
template <typename id_t>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    group_by_scenario_kernel(const id_t* __restrict__ ids, int64_t stride, int rows, int num_scenarios,
                             int64_t* __restrict__ permutation, int64_t* __restrict__ inverse,
                             int64_t* __restrict__ offsets, int* __restrict__ counters, int64_t num_counters) {
  // [warp][scenario]: first counts, then the position of the warp's next row of that scenario. Last row: totals.
  extern __shared__ int cursor[];
  const int num_warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  int* totals = cursor + num_warps * num_scenarios;
  int* own = cursor + warp * num_scenarios;

  for (int64_t i = threadIdx.x; i < num_counters; i += blockDim.x) {
    counters[i] = 0;
  }
  for (int i = threadIdx.x; i < num_warps * num_scenarios; i += blockDim.x) {
    cursor[i] = 0;
  }
  __syncthreads();

  const int rows_per_warp = (rows + num_warps - 1) / num_warps;
  const int begin = min(warp * rows_per_warp, rows);
  const int end = min(begin + rows_per_warp, rows);
  for (int base = begin; base < end; base += kWarpSize) {
    const int id = load_id(ids, stride, base + lane, end, num_scenarios);
    const unsigned peers = lanes_with_same_id(id);
    if (id >= 0 && __ffs(peers) - 1 == lane) {
      own[id] += __popc(peers);
    }
    __syncwarp();
  }
  __syncthreads();

  for (int id = threadIdx.x; id < num_scenarios; id += blockDim.x) {
    int total = 0;
    for (int w = 0; w < num_warps; ++w) {
      total += cursor[w * num_scenarios + id];
    }
    totals[id] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int position = 0;
    for (int id = 0; id < num_scenarios; ++id) {
      const int total = totals[id];
      offsets[id] = position;
      totals[id] = position;
      position += total;
    }
    offsets[num_scenarios] = position;
  }
  __syncthreads();
  for (int id = threadIdx.x; id < num_scenarios; id += blockDim.x) {
    int position = totals[id];
    for (int w = 0; w < num_warps; ++w) {
      const int count = cursor[w * num_scenarios + id];
      cursor[w * num_scenarios + id] = position;
      position += count;
    }
  }
  __syncthreads();

  const unsigned lanes_before = (1u << lane) - 1;
  for (int base = begin; base < end; base += kWarpSize) {
    const int row = base + lane;
    const int id = load_id(ids, stride, row, end, num_scenarios);
    const unsigned peers = lanes_with_same_id(id);
    if (id >= 0) {
      const int target = own[id] + __popc(peers & lanes_before);
      permutation[target] = row;
      if (inverse != nullptr) {
        inverse[row] = target;
      }
    }
    __syncwarp();
    if (id >= 0 && __ffs(peers) - 1 == lane) {
      own[id] += __popc(peers);
    }
    __syncwarp();
  }
}

// Everything at once; the inverse is undefined unless it is asked for.
struct Grouped {
  at::Tensor permutation;
  at::Tensor inverse;
  at::Tensor offsets;
  at::Tensor counters;
};

// The device-wide way, for batches or scenario counts that one block is too small for.
Grouped group_by_sort(const at::Tensor& scenario, int64_t num_scenarios, int64_t num_counters, bool with_inverse) {
  at::_assert_async(scenario.ge(0).logical_and(scenario.lt(num_scenarios)).all(),
                    "scenario ids must lie in [0, num_scenarios)");
  auto [ids, permutation] = at::sort(scenario.to(at::kLong), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  at::Tensor inverse;
  if (with_inverse) {
    inverse = at::empty_like(permutation);
    inverse.index_put_({permutation}, at::arange(permutation.size(0), permutation.options()));
  }
  return {permutation, inverse, at::searchsorted(ids, at::arange(num_scenarios + 1, ids.options())),
          at::zeros({num_counters}, scenario.options().dtype(at::kInt))};
}

Grouped group(const at::Tensor& scenario, int64_t num_scenarios, int64_t num_counters, bool with_inverse) {
  check_group_by_scenario(scenario, num_scenarios);
  check_num_counters(num_counters);
  const c10::cuda::CUDAGuard guard(scenario.device());
  const int64_t rows = scenario.size(0);
  const int64_t ints = kSharedBytes / static_cast<int64_t>(sizeof(int));
  const int64_t warps = std::min<int64_t>(kMaxWarps, ints / num_scenarios - 1);
  if (rows > kMaxRows || warps < 1) {
    return group_by_sort(scenario, num_scenarios, num_counters, with_inverse);
  }
  const auto options = scenario.options().dtype(at::kLong);
  Grouped found{at::empty({rows}, options), with_inverse ? at::empty({rows}, options) : at::Tensor(),
                at::empty({num_scenarios + 1}, options), at::empty({num_counters}, options.dtype(at::kInt))};
  const int64_t shared_bytes = (warps + 1) * num_scenarios * static_cast<int64_t>(sizeof(int));
  AT_DISPATCH_INDEX_TYPES(scenario.scalar_type(), "group_by_scenario", [&] {
    group_by_scenario_kernel<index_t><<<1, warps * kWarpSize, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(
        scenario.const_data_ptr<index_t>(), scenario.stride(0), static_cast<int>(rows), static_cast<int>(num_scenarios),
        found.permutation.data_ptr<int64_t>(), with_inverse ? found.inverse.data_ptr<int64_t>() : nullptr,
        found.offsets.data_ptr<int64_t>(), found.counters.data_ptr<int>(), num_counters);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return found;
}

GroupingAndCounters group_by_scenario_and_clear_cuda(const at::Tensor& scenario, int64_t num_scenarios,
                                                     int64_t num_counters) {
  Grouped found = group(scenario, num_scenarios, num_counters, /*with_inverse=*/false);
  return {found.permutation, found.offsets, found.counters};
}

Grouping group_by_scenario_cuda(const at::Tensor& scenario, int64_t num_scenarios) {
  Grouped found = group(scenario, num_scenarios, 0, /*with_inverse=*/true);
  return {found.permutation, found.inverse, found.offsets};
}

}  // namespace
}  // namespace saml_kernels

TORCH_LIBRARY_IMPL(saml_kernels, CUDA, library) {
  library.impl("group_by_scenario", &saml_kernels::group_by_scenario_cuda);
  library.impl("group_by_scenario_and_clear", &saml_kernels::group_by_scenario_and_clear_cuda);
}
