// A linear layer and its input gradient, by the fastest way this capability has. Included once per capability, after
// weight_panels.h. Its weight gradient is in weight_gradient.h.
//
//     prepare_rows     lays rows of [A1 ; A2] out, once for all matrices they meet
//     linear           V  = δ(bias + [A1 ; A2] W_i); linear_to_bfloat16: where V stands in bfloat16
//     linear_columns   some columns of it, without δ
//     linear_dgrad     dA = [dA +] dZ W_iᵀ
//     activate_rows    V  = δ(Z)
//
// Rows are numbered within the tile of rows at hand: matrices are given whole, and the rows of them that are meant.

template <typename scalar_t>
struct ProductScratch {
  scalar_t* panel = nullptr;
  scalar_t* rounded = nullptr;            // to bfloat16, of the rows prepared last: floats, or units
  MatrixView<const uint16_t> units = {};  // of the rows prepared last, there or where they stand
  scalar_t* transposed = nullptr;
  uint16_t* tiles = nullptr;     // of the rows prepared last
  int32_t* int8_rows = nullptr;  // of the rows prepared last
  float* row_scales = nullptr;   // of these
  scalar_t* branch = nullptr;    // V_k of a tile's rows, where streams stand in 16 bits
  int64_t tile = 0;              // its number
  // Of backward's thread.
  ThreadsTransposes<scalar_t>* transposes = nullptr;
  Lines following = {};  // what is read after the product

  ProductScratch() = default;
  // For up to that many rows, and products over at most k terms and of at most k columns.
  ProductScratch(int64_t rows, int64_t k, bool backward, Scratch<scalar_t>& scratch) {
    // Twice, as the kernel without a bfloat16 instruction packs a panel before it is packed again; at least the tiles
    // of units of a panel.
    panel = scratch.take(std::max(std::max(2 * (k + 2), kTileSide) * kPanel<scalar_t>, streamed_size(k)));
    rounded = scratch.take(rows * (k + 2));
    if (backward) {
      transposed = scratch.take(k * (round_up(rows, kPanel<scalar_t>) + kRegisterTileRows));
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      int8_rows = scratch.template take<int32_t>(int8_rows_size(rows, k));
      row_scales = scratch.take(rows);
    }
    if constexpr (kHasTiles<scalar_t>) {
      tiles = scratch.template take<uint16_t>(round_up(rows, 32) * round_up(k, 32) * kFloatParts);
    }
  }
};

// The panels of matrix i, of `terms` terms and so many columns, which are padded to whole panels.
template <typename element_t, typename scalar_t>
inline Panels<element_t> panels_of(const Layout<element_t>& layout, int64_t i, int64_t terms, int64_t columns,
                                   const ProductScratch<scalar_t>& product) {
  constexpr int64_t width = std::is_same_v<element_t, double> ? kPanel<double> : kPanel<float>;
  const int64_t size = terms * round_up(columns, width);
  Panels<element_t> panels{layout, terms, product.tile, product.following};
  panels.layout.first += layout.first == nullptr ? 0 : i * size;
  panels.layout.states += layout.states == nullptr ? 0 : i * columns;
  return panels;
}

// Rows of [A1 ; A2], for the products with matrices of these weights that follow.
template <typename scalar_t>
inline void prepare_rows(Range rows, const Input<scalar_t>& a, const Weights<scalar_t>& weights,
                         ProductScratch<scalar_t>& scratch) {
  if constexpr (kHasTiles<scalar_t>) {
    if (weights.bfloat16_panels.first != nullptr) {
      lay_out_left(a.view(), rows, weights.parts, scratch.tiles);
    }
  }
  if constexpr (kRoundsFloats<scalar_t>) {
    if (weights.rounded_panels.first != nullptr) {
      round_rows(a.view(), rows, scratch.rounded);
    }
  }
  if constexpr (kTakesBfloat16<scalar_t>) {
    if (weights.bfloat16_panels.first != nullptr) {
      scratch.units = units_of_rows(a, rows, reinterpret_cast<uint16_t*>(scratch.rounded));
    }
  }
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (weights.int8_panels.first != nullptr) {
      quantise_rows(a.view(), rows, scratch.int8_rows, scratch.row_scales);
    }
  }
}

// Columns of these rows of Z = bias + [A1 ; A2] W_i, where neither is rounded: from the beginning of a panel to that of
// another, or to the end. True: they are max(least, Z).
template <typename scalar_t>
inline bool linear_columns(Range rows, Range columns, const Input<scalar_t>& a, const Weights<scalar_t>& weights,
                           int64_t i, scalar_t least, Matrix<scalar_t> z, ProductScratch<scalar_t>& scratch) {
  const Panels<scalar_t> panels = panels_of(weights.panels, i, weights.k(), weights.n, scratch);
  return multiply(a.view().row_range(rows.begin, rows.end), weights.matrix(i).columns(columns.begin, columns.size()),
                  panels.columns(columns.begin), weights.bias + i * weights.n + columns.begin,
                  z.row_range(rows.begin, rows.end).columns(columns.begin, columns.size()), scratch.panel, false,
                  least);
}

// Rows of V, computed as floats, to where they stand in bfloat16.
template <typename scalar_t>
void write_bfloat16(ConstMatrix<scalar_t> v, const StoredMatrix<scalar_t>& streams) {
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    for (int64_t r = 0; r < v.rows; ++r) {
      round_values(v.row(r), v.cols, static_cast<uint16_t*>(streams.at(r, 0)));
    }
  } else {
    write_rows(v, streams);
  }
}

// Not inlined: every copy holds a loop of vectors for each δ.
template <typename scalar_t>
__attribute__((noinline)) void activate_rows(Activation activation, ConstMatrix<scalar_t> z, MatrixView<scalar_t> v) {
  for (int64_t r = 0; r < v.rows; ++r) {
    activate(activation, z.row(r), v.row(r), v.cols);
  }
}

// V = δ(Z) in the place of Z, or of max(least_of(δ), Z).
template <typename scalar_t>
inline void activate_sums(Activation activation, bool clamped, MatrixView<scalar_t> z) {
  if (activation != Activation::kRelu || !clamped) {
    activate_rows<scalar_t>(activation, z, z);
  }
}

#if SAML_HAS_BFLOAT16_DOT

// Rows of max(least, Z) of rounded factors, by vectors; z in float or bfloat16.
template <typename sum_t>
inline void multiply_rows_of_units(Range rows, const Input<float>& a, const Weights<float>& weights, int64_t i,
                                   float least, const MatrixView<sum_t>& z, ProductScratch<float>& scratch) {
  if (weights.bfloat16_panels.first == nullptr) {
    scratch.units = units_of_rows(a, rows, reinterpret_cast<uint16_t*>(scratch.rounded));
  }
  const int64_t terms = unit_terms(weights.k1, weights.k2);
  multiply_bfloat16<sum_t>(scratch.units.row_range(rows.begin, rows.end), weights.k1, weights.matrix(i),
                           panels_of(weights.bfloat16_panels, i, terms, weights.n, scratch),
                           weights.bias + i * weights.n, z.row_range(rows.begin, rows.end), scratch.panel, least);
}

#endif

// Rows of Z = bias + [A1 ; A2] W_i, of rounded factors if asked. These rows, or more, have been prepared. True: it is
// max(least, Z).
template <typename scalar_t>
inline bool multiply_rows(Rounding rounding, Range rows, const Input<scalar_t>& a, const Weights<scalar_t>& weights,
                          int64_t i, [[maybe_unused]] scalar_t least, Matrix<scalar_t> z,
                          ProductScratch<scalar_t>& scratch) {
  const scalar_t* bias = weights.bias + i * weights.n;
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (rounding == Rounding::kInt8) {
      const int64_t k = weights.k();
      multiply_int8(scratch.int8_rows + rows.begin * lanes_of(k), scratch.row_scales + rows.begin, k,
                    Int8Panels(weights.int8_panels.first + i * int8_panels_size(weights), k, weights.n), bias,
                    z.row_range(rows.begin, rows.end), least);
      return true;
    }
  }
  [[maybe_unused]] const bool bfloat16 = rounding == Rounding::kBfloat16;
  if constexpr (kHasTiles<scalar_t>) {
    if (const uint16_t* panels = before_tiles(weights.bfloat16_panels, i, bfloat16_panels_size(weights))) {
      const TileFactors factors{scratch.tiles, panels, tiles_of(weights.k(), kTileDepth), weights.parts};
      multiply_tiles(factors, bfloat16 ? 1 : weights.parts, rows, Sums::kFromBias, bias, z);
      return false;
    }
  }
  if constexpr (kRoundsFloats<scalar_t>) {
    if (bfloat16 && weights.rounded_panels.first != nullptr) {
      const int64_t k = weights.k();
      const StoredMatrix<const scalar_t> in_panels(nullptr, k, weights.n, weights.n, Storage::kComputed);
      return multiply<scalar_t>({{scratch.rounded + rows.begin * k, rows.size(), k, k}}, in_panels,
                                panels_of(weights.rounded_panels, i, k, weights.n, scratch), bias,
                                z.row_range(rows.begin, rows.end), scratch.panel, false, least);
    }
  }
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    if (bfloat16) {
      multiply_rows_of_units(rows, a, weights, i, least, z, scratch);
      return true;
    }
  } else if constexpr (std::is_same_v<scalar_t, float>) {
    if (bfloat16) {
      multiply_bfloat16(a.view().row_range(rows.begin, rows.end), weights.matrix(i),
                        panels_of(weights.panels, i, weights.k(), weights.n, scratch), bias,
                        z.row_range(rows.begin, rows.end), scratch.panel, scratch.rounded);
      return false;
    }
  }
  return linear_columns(rows, {0, weights.n}, a, weights, i, least, z, scratch);
}

// What a product with W_i reads first.
template <typename scalar_t>
inline Lines first_lines(Rounding rounding, const Weights<scalar_t>& weights, int64_t i,
                         const ProductScratch<scalar_t>& scratch) {
  constexpr int64_t width = kPanel<scalar_t>;
  const int64_t count = round_up(weights.n, width) / width;
  const auto of = [&](const auto& panels) {
    return panels.lines(weights.matrix(i), panels.begin(count) * width, width);
  };
  if (rounding == Rounding::kInt8 || kHasTiles<scalar_t> || weights.n == 0) {
    return {};
  }
  if (rounding == Rounding::kBfloat16 && weights.rounded_panels.first != nullptr) {
    return of(panels_of(weights.rounded_panels, i, weights.k(), weights.n, scratch));
  }
  if (kHasBfloat16Panels<scalar_t> && rounding == Rounding::kBfloat16) {
    return of(panels_of(weights.bfloat16_panels, i, unit_terms(weights.k1, weights.k2), weights.n, scratch));
  }
  return of(panels_of(weights.panels, i, weights.k(), weights.n, scratch));
}

// Rows of V = δ(Z) in its place.
template <typename scalar_t>
inline void linear(Rounding rounding, Range rows, const Input<scalar_t>& a, const Weights<scalar_t>& weights, int64_t i,
                   Activation activation, Matrix<scalar_t> v, ProductScratch<scalar_t>& scratch) {
  if (rows.size() == 0) {
    return;
  }
  const bool clamped = multiply_rows(rounding, rows, a, weights, i, least_of<scalar_t>(activation), v, scratch);
  activate_sums(activation, clamped, v.row_range(rows.begin, rows.end));
}

// Whether the product can write V = δ(Z) in bfloat16: δ is in its sums, and needs no Z in backward.
template <typename scalar_t>
inline bool gives_bfloat16(Rounding rounding, const Weights<scalar_t>& weights, Activation activation) {
  const bool in_tiles = kHasTiles<scalar_t> && weights.bfloat16_panels.first != nullptr;
  const bool in_sums = activation == Activation::kRelu || activation == Activation::kIdentity;
  return kHasBfloat16Panels<scalar_t> && rounding == Rounding::kBfloat16 && !in_tiles && in_sums;
}

// Rows of V = δ(Z) where it stands in bfloat16, which the product gives.
template <typename scalar_t>
inline void linear_to_bfloat16(Range rows, const Input<scalar_t>& a, const Weights<scalar_t>& weights, int64_t i,
                               Activation activation, const StoredMatrix<scalar_t>& v,
                               ProductScratch<scalar_t>& scratch) {
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    const MatrixView<uint16_t> target{static_cast<uint16_t*>(v.data), v.rows, v.cols, v.ld};
    multiply_rows_of_units(rows, a, weights, i, least_of<float>(activation), target, scratch);
  }
}

// The panels of W_iᵀ of rounded factors.
template <typename scalar_t>
inline Panels<uint16_t> transposed_panels_of(const Weights<scalar_t>& weights, int64_t i,
                                             const ProductScratch<scalar_t>& scratch) {
  const int64_t terms = transposed_terms(weights.n);
  if (!weights.transposed_by_threads) {
    return panels_of(weights.transposed_bfloat16_panels, i, terms, weights.k(), scratch);
  }
  Panels<uint16_t> panels = panels_of(scratch.transposes->of(weights, i), 0, terms, weights.k(), scratch);
  panels.own = true;
  return panels;
}

// Rows of dA = [dA +] dZ W_iᵀ, of rounded factors if asked where there is an instruction for them, from column `begin`
// on; what stands before it is nobody's.
template <typename scalar_t>
inline void linear_dgrad([[maybe_unused]] Rounding rounding, Range rows, ConstMatrix<scalar_t> dz,
                         const Weights<scalar_t>& weights, int64_t i, int64_t begin, Matrix<scalar_t> da,
                         bool accumulate, ProductScratch<scalar_t>& scratch) {
  if (rows.size() == 0) {
    return;
  }
  if constexpr (kHasTiles<scalar_t>) {
    if (weights.transposed_bfloat16_panels.first != nullptr) {
      lay_out_left(Concatenated<scalar_t>{dz}, rows, weights.parts, scratch.tiles);
      TileFactors factors{scratch.tiles, weights.transposed_bfloat16_panels.first + i * transposed_panels_size(weights),
                          tiles_of(weights.n, kTileDepth), weights.parts};
      // From the beginning of a tile.
      const int64_t start = begin / kTileSide * kTileSide;
      factors.right += start / kTileSide * factors.side_stride();
      multiply_tiles(factors, weights.parts, rows, accumulate ? Sums::kAccumulate : Sums::kFromBias, nullptr,
                     da.columns(start, weights.k() - start));
      return;
    }
  }
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    if (rounding == Rounding::kBfloat16) {
      const Panels<uint16_t> panels = transposed_panels_of(weights, i, scratch);
      // From the beginning of a panel.
      const int64_t start = panels.layout.first == nullptr ? begin : begin / kPanel<scalar_t> * kPanel<scalar_t>;
      multiply_transposed_bfloat16(dz.row_range(rows.begin, rows.end), weights.matrix(i).row_range(start, weights.k()),
                                   panels.columns(start),
                                   da.row_range(rows.begin, rows.end).columns(start, weights.k() - start), accumulate,
                                   scratch.panel, scratch.rounded);
      return;
    }
  }
  if (weights.transposed_panels.first != nullptr && begin == 0) {
    const Panels<scalar_t> panels = panels_of(weights.transposed_panels, i, weights.n, weights.k(), scratch);
    multiply<scalar_t>({dz.row_range(rows.begin, rows.end)}, {}, panels, nullptr, da.row_range(rows.begin, rows.end),
                       scratch.panel, accumulate);
    return;
  }
  multiply_transposed(dz.row_range(rows.begin, rows.end), weights.matrix(i).row_range(begin, weights.k()),
                      da.row_range(rows.begin, rows.end).columns(begin, weights.k() - begin), accumulate,
                      scratch.transposed);
}

// dZ = dV ∘ δ'(Z), from V, or from Z where δ needs it and else has none.
template <typename scalar_t>
inline void activate_rows_backward(Activation activation, ConstMatrix<scalar_t> v, ConstMatrix<scalar_t> z,
                                   ConstMatrix<scalar_t> dv, MatrixView<scalar_t> dz) {
  for (int64_t r = 0; r < dz.rows; ++r) {
    activate_backward(activation, v.row(r), z.row(r), dv.row(r), dz.row(r), dz.cols);
  }
}
