// Which weights are laid out before the tiles run, in which layouts.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "trunk.h"

namespace saml_kernels {

// How often a matrix of these weights is read: once for so many rows.
constexpr int64_t kRowsOfUse = 32;

struct Uses {
  int64_t own;        // in own branches and auxiliary layers
  int64_t floats;     // with float factors, in forward
  int64_t rounded;    // with bfloat16 factors, in forward
  bool own_only;      // each matrix by its own scenario's rows alone
  bool own_bfloat16;  // own factors are bfloat16
  bool in_parts;      // forward reads float factors as bfloat16 parts
};

// The passes that are about to read the weights: forward's products, and backward's of the input gradients.
struct Readers {
  bool forward;
  bool dgrad;
};

// Uses that pay for laying a matrix out. Each scenario's own rows follow each other and find its weights in cache;
// laying all of them out writes to memory first what is read back hardly more often.
constexpr int64_t kPaying = 3, kPayingOwnOnly = 12;

// One layout: where Weights keeps it, its size, and when it is made. Which ones are made depends on the batch alone, as
// a product of laid out factors may round differently.
template <typename scalar_t, typename element_t>
struct LayoutRule {
  element_t* Weights<scalar_t>::* panels;
  int64_t (*TrunkKernels<scalar_t>::*size)(const Weights<scalar_t>&);
  bool (*made)(const Uses&, const Layouts&, Readers);
};

template <typename scalar_t>
constexpr auto kLayoutRules = std::make_tuple(
    LayoutRule<scalar_t, scalar_t>{&Weights<scalar_t>::panels, &TrunkKernels<scalar_t>::panels_size,
                                   [](const Uses& uses, const Layouts&, Readers readers) {
                                     return readers.forward && !uses.in_parts &&
                                            uses.floats >= (uses.own_only ? kPayingOwnOnly : kPaying);
                                   }},
    LayoutRule<scalar_t, uint16_t>{&Weights<scalar_t>::bfloat16_panels, &TrunkKernels<scalar_t>::bfloat16_panels_size,
                                   [](const Uses& uses, const Layouts& layouts, Readers readers) {
                                     return readers.forward &&
                                            (uses.in_parts || (layouts.bfloat16 && uses.rounded >= kPaying));
                                   }},
    LayoutRule<scalar_t, uint16_t>{
        &Weights<scalar_t>::transposed_bfloat16_panels, &TrunkKernels<scalar_t>::transposed_panels_size,
        [](const Uses& uses, const Layouts& layouts, Readers readers) {
          return readers.dgrad && layouts.transposed && (uses.own >= kPaying || uses.own_bfloat16);
        }});

// Makes the layouts that pay, in memory from allocate(count, element_t()), and lists the matrices to write there.
template <typename scalar_t, typename Allocate>
std::vector<PanelItem<scalar_t>> make_layouts(const Trunk<scalar_t>& trunk, std::vector<Layer<scalar_t>>& layers,
                                              const TrunkKernels<scalar_t>& kernel, Readers readers,
                                              Allocate allocate) {
  const int64_t all_rows = trunk.rows / kRowsOfUse, own_rows = all_rows / trunk.num_scenarios;
  std::vector<PanelItem<scalar_t>> items;
  // Read so often in the own precision, and so often in the foreign.
  const auto make = [&](Weights<scalar_t>& weights, int64_t own, int64_t foreign) {
    const Uses uses{.own = own,
                    .floats = (trunk.own_bfloat16 ? 0 : own) + (trunk.foreign_bfloat16 ? 0 : foreign),
                    .rounded = (trunk.own_bfloat16 ? own : 0) + (trunk.foreign_bfloat16 ? foreign : 0),
                    .own_only = foreign == 0 && weights.matrices > 1,
                    .own_bfloat16 = trunk.own_bfloat16,
                    .in_parts = kernel.layouts.float_parts && (own + foreign >= kPaying || trunk.own_bfloat16)};
    weights.parts = kernel.layouts.float_parts && !trunk.own_bfloat16 ? 3 : 1;
    bool any = false;
    const auto apply = [&]<typename element_t>(const LayoutRule<scalar_t, element_t>& rule) {
      if (rule.made(uses, kernel.layouts, readers)) {
        weights.*rule.panels = allocate(weights.matrices * (kernel.*rule.size)(weights), element_t());
        any = true;
      }
    };
    std::apply([&](const auto&... rules) { (apply(rules), ...); }, kLayoutRules<scalar_t>);
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
