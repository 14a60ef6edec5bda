// Which weights are laid out before the tiles run, in which layouts.
#pragma once

#include <cstdint>
#include <vector>

#include "trunk.h"

namespace saml_kernels {

// The passes that are about to read the weights: the trunk's products, those of the input gradients.
struct Readers {
  bool forward;
  bool dgrad;
};

// Makes the layouts that enough rows read to pay for them, in memory that allocate(count, a pointer of its type) gives,
// and lists the matrices to write there. Which ones depends on the batch alone, as a product of laid out factors may
// round differently.
template <typename scalar_t, typename Allocate>
std::vector<PanelItem<scalar_t>> make_layouts(const Trunk<scalar_t>& trunk, std::vector<Layer<scalar_t>>& layers,
                                              const TrunkKernels<scalar_t>& kernel, Readers readers,
                                              Allocate allocate) {
  // A use is a product with that many rows. Each scenario's own rows follow each other and find its weights in cache;
  // laying all of them out writes to memory first what is read back hardly more often.
  constexpr int64_t kRowsOfUse = 32, kUses = 3, kOwnUses = 12;
  const int64_t all_rows = trunk.rows / kRowsOfUse;
  const int64_t own_rows = trunk.experts ? all_rows : all_rows / trunk.num_scenarios;
  const Layouts& has = kernel.layouts;
  std::vector<PanelItem<scalar_t>> items;
  // `own` uses of a matrix in the own precision, `foreign` ones in the foreign.
  const auto make = [&](Weights<scalar_t>& weights, int64_t own, int64_t foreign) {
    const int64_t floats = (trunk.own_bfloat16 ? 0 : own) + (trunk.foreign_bfloat16 ? 0 : foreign);
    const int64_t rounded = own + foreign - floats;
    const bool in_parts = has.float_parts && (own + foreign >= kUses || trunk.own_bfloat16);
    const int64_t enough = foreign == 0 && weights.matrices > 1 && !trunk.experts ? kOwnUses : kUses;
    bool any = false;
    const auto layout = [&](auto*& panels, auto size, bool wanted) {
      if (wanted) {
        panels = allocate(weights.matrices * size(weights), panels);
        any = true;
      }
    };
    weights.parts = has.float_parts && !trunk.own_bfloat16 ? 3 : 1;
    // Where it goes, how large it is, when it is made.
    layout(weights.panels, kernel.panels_size, readers.forward && !in_parts && floats >= enough);
    layout(weights.bfloat16_panels, kernel.bfloat16_panels_size,
           readers.forward && (in_parts || (has.bfloat16 && rounded >= kUses)));
    layout(weights.transposed_bfloat16_panels, kernel.transposed_panels_size,
           readers.dgrad && has.transposed && (own >= kUses || trunk.own_bfloat16));
    // Every tile reads the transposes of all experts; of a scenario's own, few do.
    layout(weights.transposed_panels, kernel.transposed_float_panels_size,
           readers.dgrad && trunk.experts && !has.transposed && own >= kUses);
    for (int64_t i = 0; any && i < weights.matrices; ++i) {
      items.push_back({&weights, i});
    }
  };
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    Layer<scalar_t>& layer = layers[l];
    if (layer.aux_width > 0) {
      make(layer.auxiliary, all_rows, 0);
    }
    // All rows read the weights of layers that all branches run; their gates too, but at the last of them.
    make(layer.branch, own_rows, l < trunk.num_shared ? all_rows - own_rows : 0);
    if (layer.has_mutual_unit()) {
      make(layer.gates, own_rows, l + 1 < trunk.num_shared ? all_rows - own_rows : 0);
    }
  }
  return items;
}

}  // namespace saml_kernels
