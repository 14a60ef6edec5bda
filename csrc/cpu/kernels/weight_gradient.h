// The weight gradients, item by item: rows begin .. end of one weight's, each summed over its samples in sorted order.
// Included once per capability, after trunk_backward.h.
//
//     dW_t^l = Σ [V_t^{l−1} ; A^l]ᵀ dZ_t^l     db_t^l = Σ dZ_t^l     rows of scenario t; M_t^{l−1} after a mutual unit
//     dU_t   = Σ V_tᵀ dz_g                     du_t   = Σ dz_g       rows of scenario t
//     dWa^l  = Σ (A^{l−1})ᵀ dZa^l              dba^l  = Σ dZa^l      all rows
//
// Experts' rows of dZ and of what layers saved stand expert by expert, as if sorted; x is the same for all of them.

// Rows of a weight-gradient product that are packed at a time.
constexpr int64_t kGradientChunk = 256;

// Rows of an input that are asked for ahead.
constexpr int64_t kRowsAhead = 8;

template <typename scalar_t>
constexpr int64_t kGradientItemRows = kHasTiles<scalar_t> ? 384 : 264;
// Whether an item is multiplied in tiles follows from its rows, so there they must not depend on the threads.
template <typename scalar_t>
constexpr int64_t kLeastGradientItemRows = kHasTiles<scalar_t> ? kGradientItemRows<scalar_t> : 96;

template <typename scalar_t>
struct GradientScratch {
  scalar_t* input;  // (kRegisterTileRows blocks, kGradientChunk, kRegisterTileRows)
  scalar_t* panel;
  scalar_t* rounded;   // an item's sums where they are then rounded to 16 bits
  scalar_t* gathered;  // (kGradientChunk, kGradientItemRows) of an input that stands in another order or in 16 bits
  uint16_t* left;      // of bfloat16 products, in tiles or in blocks as input's, of units
  uint16_t* right;     // in tiles

  GradientScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch) {
    input = scratch.take(kGradientChunk * round_up(kGradientItemRows<scalar_t>, kRegisterTileRows));
    panel = scratch.take(kGradientChunk * kPanel<scalar_t>);
    int64_t width = 0;
    for (int64_t l = 0; l < trunk.num_layers; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      width = std::max({width, layer.width, layer.aux_width, layer.gate_width});
    }
    rounded = scratch.take(kGradientItemRows<scalar_t> * width);
    if constexpr (kHasBfloat16Panels<scalar_t> && !kHasTiles<scalar_t>) {
      left = scratch.template take<uint16_t>(kGradientChunk * kGradientItemRows<scalar_t>);
    }
    if constexpr (kHasTiles<scalar_t>) {
      gathered = scratch.take(kGradientChunk * kGradientItemRows<scalar_t>);
      left = scratch.template take<uint16_t>(tiles_size(kGradientItemRows<scalar_t>, kGradientChunk, kFloatParts));
      right = scratch.template take<uint16_t>(tiles_size(kBlockSide, kGradientChunk, kFloatParts));
    }
  }
};

template <typename scalar_t>
int64_t gradient_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  GradientScratch<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

// [left ; right], in 16 bits or not, of which left may stand in the caller's order. right may be absent.
template <typename scalar_t>
struct GradientInput {
  StoredMatrix<const scalar_t> left;
  const int64_t* order = nullptr;  // the row of left of every row; null: as they stand
  StoredMatrix<const scalar_t> right = {};

  int64_t cols() const { return left.cols + right.cols; }
  bool in_16_bits() const { return saml_kernels::in_16_bits(left.storage) || saml_kernels::in_16_bits(right.storage); }
  int64_t row_of_left(int64_t row) const { return order == nullptr ? row : order[row]; }

  // Columns begin .. end of a row where they stand together in bfloat16, or null.
  const uint16_t* bfloat16_part(int64_t row, int64_t begin, int64_t end) const {
    const bool of_right = begin >= left.cols;
    const StoredMatrix<const scalar_t>& side = of_right ? right : left;
    if (side.storage != Storage::kBfloat16 || (!of_right && end > left.cols)) {
      return nullptr;
    }
    return static_cast<const uint16_t*>(of_right ? side.at(row, begin - left.cols) : side.at(row_of_left(row), begin));
  }

  // Columns begin .. end of a row: where they stand together as numbers, or copied into space.
  const scalar_t* part(int64_t row, int64_t begin, int64_t end, scalar_t* space) const {
    if (begin >= left.cols && right.storage == Storage::kComputed) {
      return right.view().row(row) + (begin - left.cols);
    }
    if (end <= left.cols && left.storage == Storage::kComputed) {
      return left.view().row(row_of_left(row)) + begin;
    }
    copy(row, begin, end, space);
    return space;
  }

  // Columns begin .. end of a row.
  void copy(int64_t row, int64_t begin, int64_t end, scalar_t* target) const {
    const int64_t split = std::clamp(left.cols, begin, end);
    read_row(left, row_of_left(row), begin, split - begin, target);
    if (split < end) {
      read_row(right, row, split - left.cols, end - split, target + (split - begin));
    }
  }
};

// What a weight's gradient is the sum of, and where it goes.
template <typename scalar_t>
struct WeightGradient {
  GradientInput<scalar_t> input;
  StoredMatrix<const scalar_t> dz;
  StoredMatrix<scalar_t> weight;
  StoredMatrix<scalar_t> bias;
};

// Rows begin .. end of the weight's gradient on the tile unit, from that many bfloat16 parts.
template <typename scalar_t>
void sum_outer_products_in_tiles(const WeightGradient<scalar_t>& of, int64_t begin, int64_t end, int64_t parts,
                                 Matrix<scalar_t> out, GradientScratch<scalar_t>& scratch) {
  const bool as_it_stands = of.input.order == nullptr && !of.input.in_16_bits();
  std::fill_n(out.data, out.rows * out.cols, scalar_t(0));
  for (int64_t start = 0; start < of.dz.rows; start += kGradientChunk) {
    const int64_t stop = std::min(start + kGradientChunk, of.dz.rows);
    if (as_it_stands) {
      const Concatenated<scalar_t> input{of.input.left.view(), of.input.right.view()};
      lay_out_columns<true>(input.row_range(start, stop), begin, out.rows, parts, scratch.left);
    } else {
      const Matrix<scalar_t> gathered{scratch.gathered, stop - start, out.rows, out.rows};
      for (int64_t r = start; r < stop; ++r) {
        of.input.copy(r, begin, end, gathered.row(r - start));
      }
      lay_out_columns<true>(Concatenated<scalar_t>{gathered}, 0, out.rows, parts, scratch.left);
    }
    for (int64_t column = 0; column < out.cols; column += kBlockSide) {
      const int64_t width = std::min(kBlockSide, out.cols - column);
      with_saved_elements<scalar_t>(
          of.dz.row_range(start, stop), [&]<typename element_t>(const MatrixView<const element_t>& dz) {
            lay_out_columns<false>(Concatenated<element_t>{dz}, column, width, parts, scratch.right);
          });
      const TileFactors factors{scratch.left, scratch.right, tiles_of(stop - start, kTileDepth), parts};
      multiply_tiles(factors, parts, {0, out.rows}, Sums::kAccumulate, nullptr, out.columns(column, width));
    }
  }
}

// The factors of a sum in the register tile: rows of the input column by column, in blocks of its height, and panels of
// dZ. Of floats, every row is a term of the sum.
template <typename scalar_t>
struct FloatTerms {
  static constexpr int64_t kRowsOfTerm = 1;

  GradientScratch<scalar_t>& scratch;
  alignas(64) scalar_t slice[kGradientItemRows<scalar_t> + kRegisterTileRows];

  explicit FloatTerms(GradientScratch<scalar_t>& space) : scratch(space) {}

  // Columns begin .. end of the input's row, as the left factor's term.
  void set_left(const GradientInput<scalar_t>& input, Range rows, int64_t begin, int64_t end, int64_t term) {
    input.copy(rows.begin, begin, end, slice);
    for (int64_t i = 0; i < end - begin; i += kRegisterTileRows) {
      std::copy_n(slice + i, kRegisterTileRows, scratch.input + i * kGradientChunk + term * kRegisterTileRows);
    }
  }

  void set_right(const StoredMatrix<const scalar_t>& dz) { pack_panel(dz, scratch.panel); }

  // out = [out +] the product of so many terms; its rows are from `row` on.
  void multiply(int64_t row, int64_t terms, Matrix<scalar_t> out, bool accumulate) const {
    const Operand<scalar_t> a{scratch.input + row * kGradientChunk, 1, kRegisterTileRows, terms};
    const Operand<scalar_t> nothing{a.data, 0, 0, 0};
    multiply_tile<scalar_t>(a, nothing, scratch.panel, kPanel<scalar_t>, nullptr, out, accumulate,
                            least_of<scalar_t>(Activation::kIdentity), Lines().or_none(scratch.panel).next(terms));
  }
};

#if SAML_HAS_BFLOAT16_DOT

// Of bfloat16, two rows are.
struct UnitTerms {
  static constexpr int64_t kRowsOfTerm = 2;
  static constexpr int64_t kTerms = kGradientChunk / kRowsOfTerm;
  static_assert(kRegisterTileRows <= kTileSide);

  GradientScratch<float>& scratch;
  alignas(64) float slices[2][kGradientItemRows<float>];

  explicit UnitTerms(GradientScratch<float>& space) : scratch(space) {}

  void set_left(const GradientInput<float>& input, Range rows, int64_t begin, int64_t end, int64_t term) {
    const bool pair = rows.size() > 1;
    if (const uint16_t* even = input.bfloat16_part(rows.begin, begin, end)) {
      const uint16_t* odd = pair ? input.bfloat16_part(rows.begin + 1, begin, end) : nullptr;
      set_units(end - begin, term, [&](int64_t i, __mmask16 columns) {
        const __m256i second = odd == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(columns, odd + i);
        return units_of(_mm256_maskz_loadu_epi16(columns, even + i), second);
      });
      return;
    }
    const float* even = input.part(rows.begin, begin, end, slices[0]);
    const float* odd = pair ? input.part(rows.begin + 1, begin, end, slices[1]) : nullptr;
    set_units(end - begin, term, [&](int64_t i, __mmask16 columns) {
      const __m512 second = odd == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(columns, odd + i);
      return units_of(_mm512_maskz_loadu_ps(columns, even + i), second);
    });
  }

  void set_right(const StoredMatrix<const float>& dz) {
    with_saved_elements<float>(dz,
                               [&](const auto& view) { pack_units(view, reinterpret_cast<uint16_t*>(scratch.panel)); });
  }

  void multiply(int64_t row, int64_t terms, const MatrixView<float>& out, bool accumulate) const {
    alignas(64) static constexpr float kNothing[kPanel<float>] = {};
    const UnitOperand a{scratch.left + 2 * row * kTerms, 2, 2 * kRegisterTileRows, terms};
    multiply_tile_units<float>(a, reinterpret_cast<const uint16_t*>(scratch.panel), kNothing, out, accumulate,
                               least_of<float>(Activation::kIdentity), Lines().or_none(scratch.panel).next(terms));
  }

 private:
  // units(i, columns): those of so many columns from i on.
  template <typename Units>
  void set_units(int64_t count, int64_t term, const Units& units) {
    for (int64_t i = 0; i < count; i += kRegisterTileRows) {
      const __mmask16 columns = first_lanes(std::min<int64_t>(kRegisterTileRows, count - i));
      _mm512_mask_storeu_epi32(scratch.left + 2 * (i * kTerms + term * kRegisterTileRows),
                               first_lanes(kRegisterTileRows), units(i, columns));
    }
  }
};

#endif

// The same in the register tile.
template <typename Terms, typename scalar_t>
void sum_outer_products(const WeightGradient<scalar_t>& of, int64_t begin, int64_t end, Matrix<scalar_t> out,
                        GradientScratch<scalar_t>& scratch) {
  constexpr int64_t panel_width = kPanel<scalar_t>, step = Terms::kRowsOfTerm;
  Terms terms(scratch);
  if (of.dz.rows == 0) {
    std::fill_n(out.data, out.rows * out.cols, scalar_t(0));
  }
  for (int64_t start = 0; start < of.dz.rows; start += kGradientChunk) {
    const int64_t stop = std::min(start + kGradientChunk, of.dz.rows), count = (stop - start + step - 1) / step;
    for (int64_t r = start; r < stop; r += step) {
      // Slices of rows are too far apart for the processor to guess the next one.
      for (int64_t ahead = r + kRowsAhead; ahead < std::min(r + kRowsAhead + step, of.dz.rows); ++ahead) {
        prefetch_columns(of.input.left, of.input.row_of_left(ahead), begin, std::min(end, of.input.left.cols));
      }
      terms.set_left(of.input, {r, std::min(r + step, stop)}, begin, end, (r - start) / step);
    }
    for (int64_t column = 0; column < out.cols; column += panel_width) {
      const int64_t width = std::min(panel_width, out.cols - column);
      terms.set_right(of.dz.row_range(start, stop).columns(column, width));
      for (int64_t r = start; r < stop && column + width < out.cols; ++r) {
        prefetch_columns(of.dz, r, column + width, column + width + 1);
      }
      for (int64_t i = 0; i < out.rows; i += kRegisterTileRows) {
        const Range rows{i, std::min(i + kRegisterTileRows, out.rows)};
        terms.multiply(i, count, out.row_range(rows.begin, rows.end).columns(column, width), start > 0);
      }
    }
  }
}

// In double, as rows may cancel: their sum is then small against what it is the sum of.
template <typename scalar_t>
void sum_rows(ConstStored<scalar_t> dz, Stored<scalar_t> out) {
  constexpr int64_t kColumns = 256;
  alignas(64) scalar_t values[kColumns];
  for (int64_t begin = 0; begin < dz.cols; begin += kColumns) {
    const int64_t count = std::min(kColumns, dz.cols - begin);
    alignas(64) double sums[kColumns] = {};
    for (int64_t r = 0; r < dz.rows; ++r) {
      const scalar_t* row = row_of(dz.columns(begin, count), r, values);
      for (int64_t i = 0; i < count; ++i) {
        sums[i] += static_cast<double>(row[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<scalar_t>(sums[i]);
    }
    write_row(values, count, out, 0, begin);
  }
}

template <typename scalar_t>
WeightGradient<scalar_t> weight_gradient(const BackwardPass<scalar_t>& pass, const GradientItem& item) {
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Layer<scalar_t>& layer = trunk.layers[item.layer];
  const Saved<const scalar_t>& saved = pass.saved[item.layer];
  const Saved<const scalar_t>* before = item.layer > 0 ? &pass.saved[item.layer - 1] : nullptr;
  const LayerGradients<scalar_t>& gradients = pass.gradients[item.layer];
  const int64_t k = item.scenario;
  const auto of_scenario = [&](const auto& matrix) { return matrix.row_range(trunk.offsets[k], trunk.offsets[k + 1]); };
  const auto gradient = [&](const GradientInput<scalar_t>& input, const StoredMatrix<const scalar_t>& dz,
                            const ParameterGradient& out) -> WeightGradient<scalar_t> {
    const int64_t height = input.cols(), n = dz.cols;
    const StoredMatrix<scalar_t> weights(out.weight, height, n, n, out.storage), biases(out.bias, 1, n, n, out.storage);
    return {input, dz, weights.row_range(k * height, (k + 1) * height), biases.row_range(k, k + 1)};
  };
  switch (item.kind) {
    case GradientItem::Kind::kBranch: {
      const StoredMatrix<scalar_t> dz = of_scenario(gradients.dz);
      if (before == nullptr) {
        const int64_t begin = trunk.per_branch_input ? k * layer.in_width : 0;
        const int64_t* order = trunk.experts ? nullptr : trunk.permutation + trunk.offsets[k];
        const StoredMatrix<const scalar_t> aux =
            trunk.experts ? StoredMatrix<const scalar_t>() : of_scenario(saved.aux);
        return gradient({trunk.x_local.columns(begin, layer.in_width), order, aux}, dz, gradients.branch);
      }
      const StoredMatrix<const scalar_t> left = before->mutual.data != nullptr ? before->mutual : before->own;
      return gradient({of_scenario(left), nullptr, of_scenario(saved.aux)}, dz, gradients.branch);
    }
    case GradientItem::Kind::kGate:
      return gradient({of_scenario(saved.own), nullptr, {}}, of_scenario(gradients.dz_gate), gradients.gates);
    case GradientItem::Kind::kAuxiliary:
      break;
  }
  if (before == nullptr) {
    return gradient({trunk.x_global, trunk.permutation, {}}, gradients.dz_aux, gradients.auxiliary);
  }
  return gradient({before->aux, nullptr, {}}, gradients.dz_aux, gradients.auxiliary);
}

template <typename scalar_t>
void sum_products(const WeightGradient<scalar_t>& of, const GradientItem& item, [[maybe_unused]] bool own_bfloat16,
                  Matrix<scalar_t> out, GradientScratch<scalar_t>& scratch) {
  if constexpr (kHasTiles<scalar_t>) {
    // Below a tile in any direction most of it would be zeros.
    if (std::min({of.dz.rows, item.end - item.begin, of.dz.cols}) >= kTileSide) {
      sum_outer_products_in_tiles(of, item.begin, item.end, own_bfloat16 ? 1 : kFloatParts, out, scratch);
      return;
    }
  }
#if SAML_HAS_BFLOAT16_DOT
  if constexpr (kHasBfloat16Panels<scalar_t>) {
    if (own_bfloat16) {
      sum_outer_products<UnitTerms>(of, item.begin, item.end, out, scratch);
      return;
    }
  }
#endif
  sum_outer_products<FloatTerms<scalar_t>>(of, item.begin, item.end, out, scratch);
}

template <typename scalar_t>
void gradient_item(const BackwardPass<scalar_t>& pass, const GradientItem& item, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  GradientScratch<scalar_t> scratch(pass.trunk, pieces);
  const WeightGradient<scalar_t> of = weight_gradient(pass, item);
  const bool rounds = of.weight.storage != Storage::kComputed;
  const int64_t height = item.end - item.begin, n = of.dz.cols;
  const Matrix<scalar_t> out =
      rounds ? Matrix<scalar_t>{scratch.rounded, height, n, n} : of.weight.view().row_range(item.begin, item.end);
  sum_products(of, item, pass.trunk.own_bfloat16, out, scratch);
  write_rows(out, of.weight.row_range(item.begin, item.end));
  if (item.begin == 0) {
    sum_rows<scalar_t>(of.dz, of.bias);
  }
}
