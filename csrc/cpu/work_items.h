// The work of the weight gradients, cut into items that threads take one by one.
#pragma once

#include <algorithm>
#include <vector>

#include "trunk.h"

namespace saml_kernels {

// Rows of a weight in an item: each item lays its rows of dZ out, so the more rows the better, but every thread wants a
// few items. No sum depends on it.
template <typename scalar_t>
int64_t rows_of_item(const Trunk<scalar_t>& trunk, const TrunkKernels<scalar_t>& kernel, int64_t threads) {
  constexpr int64_t kItemsPerThread = 4, kMultiple = 12;
  int64_t rows = 0;
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    rows += trunk.num_scenarios * (trunk.layers[l].in_width + trunk.layers[l].aux_width);
  }
  const int64_t share = rows / (kItemsPerThread * threads) / kMultiple * kMultiple;
  return std::clamp(share, kernel.least_gradient_item_rows, kernel.gradient_item_rows);
}

// gates_only: of the mutual unit alone, which has no other parameters.
template <typename scalar_t>
std::vector<GradientItem> gradient_items(const Trunk<scalar_t>& trunk, int64_t rows_of_item, bool gates_only = false) {
  using Kind = GradientItem::Kind;
  std::vector<GradientItem> items;
  const auto add = [&](Kind kind, int64_t layer, int64_t scenario, int64_t height) {
    // A weight without rows still has a bias.
    for (int64_t begin = 0; begin == 0 || begin < height; begin += rows_of_item) {
      items.push_back({kind, layer, scenario, begin, std::min(begin + rows_of_item, height)});
    }
  };
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    if (layer.aux_width > 0) {
      add(Kind::kAuxiliary, l, 0, layer.aux_in);
    }
    for (int64_t k = 0; k < trunk.num_scenarios; ++k) {
      if (!gates_only) {
        add(Kind::kBranch, l, k, layer.in_width + layer.aux_width);
      }
      if (layer.has_mutual_unit()) {
        add(Kind::kGate, l, k, layer.width);
      }
    }
  }
  return items;
}

}  // namespace saml_kernels
