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
  uint16_t* left;
  uint16_t* right;

  explicit GradientScratch(Scratch<scalar_t>& scratch) {
    input = scratch.take(kGradientChunk * round_up(kGradientItemRows<scalar_t>, kRegisterTileRows));
    panel = scratch.take(kGradientChunk * kPanel<scalar_t>);
    if constexpr (kHasTiles<scalar_t>) {
      left = scratch.template take<uint16_t>(tiles_size(kGradientItemRows<scalar_t>, kGradientChunk, kFloatParts));
      right = scratch.template take<uint16_t>(tiles_size(kBlockSide, kGradientChunk, kFloatParts));
    }
  }
};

template <typename scalar_t>
int64_t gradient_scratch() {
  Scratch<scalar_t> scratch(nullptr);
  GradientScratch<scalar_t>{scratch};
  return scratch.bytes();
}

// What a weight's gradient is the sum of, and where it goes.
template <typename scalar_t>
struct WeightGradient {
  Concatenated<scalar_t> input;
  ConstMatrix<scalar_t> dz;
  Matrix<scalar_t> weight;
  scalar_t* bias;
};

// Columns begin .. end of a row.
template <typename scalar_t>
void copy_columns(const Concatenated<scalar_t>& input, int64_t row, int64_t begin, int64_t end, scalar_t* target) {
  const auto& [left, right] = input;
  const int64_t split = std::clamp(left.cols, begin, end);
  std::copy(left.row(row) + begin, left.row(row) + split, target);
  if (split < end) {
    std::copy(right.row(row) + (split - left.cols), right.row(row) + (end - left.cols), target + (split - begin));
  }
}

// Rows begin .. end of the weight's gradient on the tile unit, from that many bfloat16 parts.
template <typename scalar_t>
void sum_outer_products_in_tiles(const WeightGradient<scalar_t>& of, int64_t begin, int64_t end, int64_t parts,
                                 GradientScratch<scalar_t>& scratch) {
  const Matrix<scalar_t> out = of.weight.row_range(begin, end);
  std::fill_n(out.data, out.rows * out.cols, scalar_t(0));
  for (int64_t start = 0; start < of.dz.rows; start += kGradientChunk) {
    const int64_t stop = std::min(start + kGradientChunk, of.dz.rows);
    lay_out_columns<true>(of.input.row_range(start, stop), begin, out.rows, parts, scratch.left);
    for (int64_t column = 0; column < out.cols; column += kBlockSide) {
      const int64_t width = std::min(kBlockSide, out.cols - column);
      lay_out_columns<false>(Concatenated<scalar_t>{of.dz.row_range(start, stop)}, column, width, parts, scratch.right);
      const TileFactors factors{scratch.left, scratch.right, tiles_of(stop - start, kTileDepth), parts};
      multiply_tiles(factors, parts, {0, out.rows}, Sums::kAccumulate, nullptr, out.columns(column, width));
    }
  }
}

// The same in the register tile.
template <typename scalar_t>
void sum_outer_products(const WeightGradient<scalar_t>& of, int64_t begin, int64_t end,
                        GradientScratch<scalar_t>& scratch) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const Matrix<scalar_t> out = of.weight.row_range(begin, end);
  alignas(64) scalar_t slice[kGradientItemRows<scalar_t> + kRegisterTileRows];
  std::fill_n(out.data, out.rows * out.cols, scalar_t(0));
  for (int64_t start = 0; start < of.dz.rows; start += kGradientChunk) {
    const int64_t stop = std::min(start + kGradientChunk, of.dz.rows);
    for (int64_t r = 0; r < stop - start; ++r) {
      // Slices of rows are too far apart for the processor to guess the next one.
      prefetch_columns<scalar_t>(of.input.left, start + r + kRowsAhead, begin, std::min(end, of.input.left.cols));
      copy_columns(of.input, start + r, begin, end, slice);
      for (int64_t i = 0; i < out.rows; i += kRegisterTileRows) {
        std::copy_n(slice + i, kRegisterTileRows, scratch.input + (i * kGradientChunk) + r * kRegisterTileRows);
      }
    }
    for (int64_t column = 0; column < out.cols; column += panel_width) {
      const int64_t width = std::min(panel_width, out.cols - column);
      pack_panel(of.dz.row_range(start, stop).columns(column, width), scratch.panel);
      for (int64_t r = start; r < stop && column + width < out.cols; ++r) {
        prefetch_columns<scalar_t>(of.dz, r, column + width, column + width + 1);
      }
      for (int64_t i = 0; i < out.rows; i += kRegisterTileRows) {
        const Operand<scalar_t> a{scratch.input + i * kGradientChunk, 1, kRegisterTileRows, stop - start};
        const Operand<scalar_t> nothing{a.data, 0, 0, 0};
        multiply_tile<scalar_t>(a, nothing, scratch.panel, panel_width, nullptr,
                                out.row_range(i, std::min(i + kRegisterTileRows, out.rows)).columns(column, width),
                                true);
      }
    }
  }
}

// In double, as rows may cancel: their sum is then small against what it is the sum of.
template <typename scalar_t>
void sum_rows(ConstMatrix<scalar_t> dz, scalar_t* out) {
  constexpr int64_t kColumns = 256;
  for (int64_t begin = 0; begin < dz.cols; begin += kColumns) {
    const int64_t count = std::min(kColumns, dz.cols - begin);
    alignas(64) double sums[kColumns] = {};
    for (int64_t r = 0; r < dz.rows; ++r) {
      const scalar_t* row = dz.row(r) + begin;
      for (int64_t i = 0; i < count; ++i) {
        sums[i] += static_cast<double>(row[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      out[begin + i] = static_cast<scalar_t>(sums[i]);
    }
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
  const auto gradient = [&](const Concatenated<scalar_t>& input, Matrix<scalar_t> dz,
                            const ParameterGradient<scalar_t>& out) -> WeightGradient<scalar_t> {
    const int64_t height = input.cols(), n = dz.cols;
    return {input, dz, {out.weight + k * height * n, height, n, n}, out.bias + k * n};
  };
  switch (item.kind) {
    case GradientItem::Kind::kBranch: {
      ConstMatrix<scalar_t> left;
      if (before == nullptr) {
        left = trunk.x_local.columns(trunk.per_branch_input ? k * layer.in_width : 0, layer.in_width);
        if (trunk.experts) {
          return gradient({left}, of_scenario(gradients.dz), gradients.branch);
        }
      } else {
        left = before->mutual.data != nullptr ? before->mutual : before->own;
      }
      return gradient({of_scenario(left), of_scenario(saved.aux)}, of_scenario(gradients.dz), gradients.branch);
    }
    case GradientItem::Kind::kGate:
      return gradient({of_scenario(saved.own)}, of_scenario(gradients.dz_gate), gradients.gates);
    case GradientItem::Kind::kAuxiliary:
      break;
  }
  return gradient({before != nullptr ? before->aux : trunk.x_global}, gradients.dz_aux, gradients.auxiliary);
}

template <typename scalar_t>
void gradient_item(const BackwardPass<scalar_t>& pass, const GradientItem& item, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  GradientScratch<scalar_t> scratch(pieces);
  const WeightGradient<scalar_t> of = weight_gradient(pass, item);
  bool in_tiles = false;
  if constexpr (kHasTiles<scalar_t>) {
    // Below a tile in any direction most of it would be zeros.
    in_tiles = std::min({of.dz.rows, item.end - item.begin, of.dz.cols}) >= kTileSide;
    if (in_tiles) {
      sum_outer_products_in_tiles(of, item.begin, item.end, pass.trunk.own_bfloat16 ? 1 : kFloatParts, scratch);
    }
  }
  if (!in_tiles) {
    sum_outer_products(of, item.begin, item.end, scratch);
  }
  if (item.begin == 0) {
    sum_rows(of.dz, of.bias);
  }
}
