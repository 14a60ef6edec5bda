// Weights as products read them: how large the panels of one matrix are, and how they are laid out. Included once per
// capability, after the gemm files.

// Products read tiles of bfloat16 parts.
template <typename scalar_t>
constexpr bool kHasTiles = SAML_HAS_TILES != 0 && std::is_same_v<scalar_t, float>;

// Products of bfloat16 factors read panels of their own.
template <typename scalar_t>
constexpr bool kHasBfloat16Panels = SAML_HAS_BFLOAT16_DOT != 0 && std::is_same_v<scalar_t, float>;

// Or they are products of floats that have been rounded.
template <typename scalar_t>
constexpr bool kRoundsFloats = SAML_HAS_BFLOAT16_DOT == 0 && std::is_same_v<scalar_t, float>;

// They take rows that stand in bfloat16. Tiles are laid out of floats.
template <typename scalar_t>
constexpr bool kTakesBfloat16 = kHasBfloat16Panels<scalar_t> && !kHasTiles<scalar_t>;

template <typename scalar_t>
int64_t panels_size(const Weights<scalar_t>& weights) {
  return weights.k() * round_up(weights.n, kPanel<scalar_t>);
}

template <typename scalar_t>
int64_t transposed_float_panels_size(const Weights<scalar_t>& weights) {
  return weights.n * round_up(weights.k(), kPanel<scalar_t>);
}

template <typename scalar_t>
int64_t bfloat16_panels_size(const Weights<scalar_t>& weights) {
  if constexpr (kHasTiles<scalar_t>) {
    return tiles_size(weights.n, weights.k(), weights.parts);
  }
  return unit_terms(weights.k1, weights.k2) * round_up(weights.n, kPanel<scalar_t>);
}

template <typename scalar_t>
int64_t transposed_panels_size(const Weights<scalar_t>& weights) {
  if constexpr (kHasTiles<scalar_t>) {
    return tiles_size(weights.k(), weights.n, weights.parts);
  }
  return transposed_terms(weights.n) * round_up(weights.k(), kPanel<scalar_t>);
}

// The transposes of own weights that a thread lays out for its tiles, of each weight the one of the scenario at hand:
// it lasts from tile to tile, which come to one scenario after the other.
template <typename scalar_t>
class ThreadsTransposes {
 public:
  ThreadsTransposes(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch) {
    for (int64_t l = 0; kTakesBfloat16<scalar_t> && l < trunk.num_layers; ++l) {
      for (const Weights<scalar_t>* weights : {&trunk.layers[l].branch, &trunk.layers[l].gates}) {
        if (weights->transposed_by_threads) {
          places_.push_back({weights, scratch.template take_lasting<int64_t>(1),
                             scratch.template take_lasting<uint16_t>(transposed_panels_size(*weights)),
                             scratch.template take_lasting<uint8_t>(weights->k())});
        }
      }
    }
  }

  // Before the first tile.
  void begin() {
    for (const Place& place : places_) {
      *place.matrix = -1;
    }
  }

  Layout<uint16_t> of(const Weights<scalar_t>& weights, int64_t i) {
    const auto place =
        std::find_if(places_.begin(), places_.end(), [&](const Place& p) { return p.weights == &weights; });
    if (*place->matrix != i) {
      std::fill_n(place->states, weights.k(), kNotLaidOut);
      *place->matrix = i;
    }
    return {place->panels, place->states};
  }

 private:
  struct Place {
    const Weights<scalar_t>* weights;
    int64_t* matrix;
    uint16_t* panels;
    uint8_t* states;  // as Layout's
  };

  std::vector<Place> places_;
};

// The panels of matrix i, of that size, that are laid out before the tiles run, or null.
template <typename element_t>
inline element_t* before_tiles(const Layout<element_t>& layout, int64_t i, int64_t size) {
  return layout.before_tiles() ? layout.first + i * size : nullptr;
}

template <typename scalar_t>
void lay_out(const PanelItem<scalar_t>& item) {
  const Weights<scalar_t>& weights = *item.weights;
  const StoredMatrix<const scalar_t> matrix = weights.matrix(item.matrix);
  if (weights.panels.before_tiles()) {
    pack_panels(matrix, weights.panels.first + item.matrix * panels_size(weights));
  }
  if constexpr (kRoundsFloats<scalar_t>) {
    if (weights.rounded_panels.first != nullptr) {
      scalar_t* panels = weights.rounded_panels.first + item.matrix * panels_size(weights);
      pack_panels(matrix, panels);
      round_values(panels, panels_size(weights), panels);
    }
  }
  if (weights.transposed_panels.first != nullptr) {
    pack_transposed_panels(matrix,
                           weights.transposed_panels.first + item.matrix * transposed_float_panels_size(weights));
  }
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (weights.int8_panels.first != nullptr) {
      int8_t* block = weights.int8_panels.first + item.matrix * int8_panels_size(weights);
      with_stored_elements<float>(
          matrix, [&](const auto& view) { pack_int8_panels(view, Int8Panels(block, weights.k(), weights.n)); });
    }
  }
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    uint16_t* panels = before_tiles(weights.bfloat16_panels, item.matrix, bfloat16_panels_size(weights));
    uint16_t* transposed =
        before_tiles(weights.transposed_bfloat16_panels, item.matrix, transposed_panels_size(weights));
    if constexpr (kHasTiles<scalar_t>) {
      with_elements<scalar_t>(matrix, [&]<typename element_t>(const MatrixView<const element_t>& view) {
        const Concatenated<element_t> source{view};
        if (panels != nullptr) {
          lay_out_columns<false>(source, 0, weights.n, weights.parts, panels);
        }
        if (transposed != nullptr) {
          lay_out_right_transposed(source, weights.parts, transposed);
        }
      });
    } else {
      with_stored_elements<scalar_t>(matrix, [&](const auto& view) {
        if (panels != nullptr) {
          pack_all_units(view, weights.k1, panels);
        }
        if (transposed != nullptr) {
          pack_all_transposed_units(view, transposed);
        }
      });
    }
  }
}
