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

// Makes the layouts that enough rows read to pay for them, or that are kept, and lists the matrices to write there
// before the tiles run; panels that tiles can lay out for each other, and that are not kept, are left to them, and
// transposes of which every thread needs one at a time to the `threads`.
// Which ones depends on the batch alone, as a product of laid out factors may round differently; where it does not,
// whatever is kept is laid out. Memory gives
//
//     keeps(weights)                          whether layouts of these are kept
//     find(weights, kind, count, panels)      whether that one is; panels then point to it
//     allocate(weights, kind, count, panels)  sets panels
//     states(count)                           of so many columns, none laid out
template <typename scalar_t, typename Memory>
std::vector<PanelItem<scalar_t>> make_layouts(const Trunk<scalar_t>& trunk, std::vector<Layer<scalar_t>>& layers,
                                              const TrunkKernels<scalar_t>& kernel, Readers readers, int64_t threads,
                                              Memory& memory) {
  // A use is a product with that many rows. Each scenario's own rows follow each other and find its weights in cache;
  // laying all of them out writes to memory first what is read back hardly more often.
  constexpr int64_t kRowsOfUse = 32, kUses = 3, kOwnUses = 12;
  const int64_t all_rows = trunk.rows / kRowsOfUse;
  const int64_t own_rows = trunk.experts ? all_rows : all_rows / trunk.num_scenarios;
  const Layouts& has = kernel.layouts;
  std::vector<PanelItem<scalar_t>> items;
  // `own` uses of a matrix in the own precision and, where foreign rows read it, `foreign` ones in the foreign.
  const auto make = [&](Weights<scalar_t>& weights, int64_t own, bool has_foreign) {
    const bool int8 = has_foreign && trunk.foreign_rounding == Rounding::kInt8;
    const int64_t foreign = has_foreign && !int8 ? all_rows - own : 0;
    // Of a weight that stands in bfloat16, panels of floats are rounded ones.
    const bool is_rounded = weights.storage == Storage::kBfloat16 && !has.bfloat16;
    const bool own_floats = !trunk.own_bfloat16 || is_rounded;
    const bool foreign_floats = trunk.foreign_rounding != Rounding::kBfloat16 || is_rounded;
    const int64_t floats = (own_floats ? own : 0) + (foreign_floats ? foreign : 0);
    const int64_t rounded = own + foreign - floats;
    const bool in_parts = has.float_parts && (own + foreign >= kUses || trunk.own_bfloat16);
    const int64_t enough = foreign == 0 && weights.matrices > 1 && !trunk.experts ? kOwnUses : kUses;
    // The tile unit multiplies nothing else; vectors, where few tiles read a transposed panel, transpose it for each.
    const bool rounds = has.bfloat16 && trunk.own_bfloat16;
    const bool transposes = readers.dgrad && (has.float_parts ? rounds || own >= kUses : rounds && own >= enough);
    // All transposes at once take as much memory as the weights; a thread's, one of each weight.
    weights.transposed_by_threads = transposes && !has.float_parts && !trunk.experts && threads < weights.matrices;
    const bool kept = memory.keeps(weights);
    const bool reads_floats = own_floats || (has_foreign && !int8 && foreign_floats);
    const bool reads_rounded = !own_floats || (has_foreign && !int8 && !foreign_floats);
    weights.parts = has.float_parts && !trunk.own_bfloat16 ? 3 : 1;
    // Number and place, how large it is, how many columns of a matrix tiles can lay out, when it is made.
    const auto for_each_layout = [&](const auto& function) {
      // A panel that is widened from 16 bits for every tile costs next to nothing, panels of floats twice the weights'
      // memory. The only tile packs each panel as it comes to it; not so those of the tile unit, which round otherwise.
      const bool several = trunk.num_tiles() > 1;
      const bool pays = floats >= enough && several && !in_16_bits(weights.storage);
      function(0, weights.panels, kernel.panels_size, weights.n,
               readers.forward && !in_parts && (pays || (kept && reads_floats && trunk.rows > kRowsBeforePanels)));
      function(1, weights.bfloat16_panels, kernel.bfloat16_panels_size, has.float_parts ? 0 : weights.n,
               readers.forward && (in_parts || (has.bfloat16 && ((rounded >= enough && (several || has.float_parts)) ||
                                                                 (kept && reads_rounded && !has.float_parts)))));
      // Else every tile would round the weight again.
      function(5, weights.rounded_panels, kernel.panels_size, 0,
               readers.forward && !has.bfloat16 &&
                   ((rounded >= kUses && several) || (kept && reads_rounded && trunk.rows > kRowsBeforePanels)));
      function(2, weights.transposed_bfloat16_panels, kernel.transposed_panels_size, 0,
               transposes && !weights.transposed_by_threads);
      // Every tile reads the transposes of all experts; of a scenario's own, few do.
      function(3, weights.transposed_panels, kernel.transposed_float_panels_size, 0,
               readers.dgrad && trunk.experts && !has.float_parts && !rounds && own >= kUses);
      // There is no product that rounds to int8 on the way.
      function(4, weights.int8_panels, kernel.int8_panels_size, 0, readers.forward && int8);
    };
    bool any = false, found = kept, before = false;
    for_each_layout([&](int64_t kind, auto& layout, auto size, int64_t, bool wanted) {
      any |= wanted;
      found = found && (!wanted || memory.find(weights, kind, weights.matrices * size(weights), layout.first));
    });
    if (!any || found) {
      return;
    }
    for_each_layout([&](int64_t kind, auto& layout, auto size, int64_t columns, bool wanted) {
      if (!wanted) {
        return;
      }
      memory.allocate(weights, kind, weights.matrices * size(weights), layout.first);
      if (columns > 0 && !kept) {
        layout.states = memory.states(weights.matrices * columns);
      } else {
        before = true;
      }
    });
    for (int64_t i = 0; before && i < weights.matrices; ++i) {
      items.push_back({&weights, i});
    }
  };
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    Layer<scalar_t>& layer = layers[l];
    if (layer.aux_width > 0) {
      make(layer.auxiliary, all_rows, false);
    }
    // All rows read the weights of layers that all branches run; their gates too, but at the last of them.
    make(layer.branch, own_rows, l < trunk.num_shared && !trunk.experts);
    if (layer.has_mutual_unit()) {
      make(layer.gates, own_rows, l + 1 < trunk.num_shared);
    }
  }
  return items;
}

}  // namespace saml_kernels
