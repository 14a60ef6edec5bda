// The weight gradients, item by item. Included once per capability, after trunk_backward.h.

// Rows of a weight-gradient product that are packed at a time.
constexpr int64_t kGradientChunk = 256;

template <typename scalar_t>
constexpr int64_t kGradientItemRows = kHasTiles<scalar_t> ? 384 : 96;

template <typename scalar_t>
struct GradientScratch {
  scalar_t* input;  // (kTileRows blocks, kGradientChunk, kTileRows)
  scalar_t* panel;
  uint16_t* left;
  uint16_t* right;

  explicit GradientScratch(Scratch<scalar_t>& scratch) {
    input = scratch.take(kGradientChunk * round_up(kGradientItemRows<scalar_t>, kTileRows));
    panel = scratch.take(kGradientChunk * kPanel<scalar_t>);
    if constexpr (kHasTiles<scalar_t>) {
      left = scratch.template take<uint16_t>(tiles_size(kGradientItemRows<scalar_t>, kGradientChunk, kFloatParts));
      right = scratch.template take<uint16_t>(tiles_size(kBlockSide, kGradientChunk, kFloatParts));
    }
  }
};

template <typename scalar_t>
int64_t gradient_scratch(const Trunk<scalar_t>&) {
  Scratch<scalar_t> scratch(nullptr);
  GradientScratch<scalar_t>{scratch};
  return scratch.bytes();
}

// Columns begin .. end of [left ; right], of which left has left_width.
template <typename scalar_t>
struct Columns {
  View<const scalar_t> left;
  int64_t left_width;
  View<const scalar_t> right;
  int64_t right_width;

  void copy(int64_t row, int64_t begin, int64_t end, scalar_t* target) const {
    const int64_t split = std::clamp(left_width, begin, end);
    std::copy(left.row(row) + begin, left.row(row) + split, target);
    if (split < end) {
      std::copy(right.row(row) + (split - left_width), right.row(row) + (end - left_width), target + (split - begin));
    }
  }
};

#if SAML_HAS_TILES

// The same sum on the tile unit, of that many bfloat16 parts.
inline void sum_outer_products_in_tiles(int64_t rows, const Columns<float>& columns, int64_t begin, int64_t end,
                                        const float* dz, int64_t n, int64_t parts, float* out,
                                        GradientScratch<float>& scratch) {
  std::fill_n(out, (end - begin) * n, 0.0f);
  for (int64_t start = 0; start < rows; start += kGradientChunk) {
    const int64_t chunk = std::min(kGradientChunk, rows - start);
    const TileSource source{columns.left.row(start),
                            columns.left.ld,
                            columns.left_width,
                            columns.right.row(start),
                            columns.right.ld,
                            columns.right_width,
                            chunk};
    lay_out_columns<true>(source, begin, end - begin, parts, scratch.left);
    for (int64_t column = 0; column < n; column += kBlockSide) {
      const int64_t width = std::min(kBlockSide, n - column);
      lay_out_columns<false>(one_matrix(dz + start * n, n, n, chunk), column, width, parts, scratch.right);
      const TileFactors factors{scratch.left, scratch.right, tiles_of(chunk, kTileDepth), parts};
      multiply_tiles(factors, parts, 0, end - begin, width, Sums::kAccumulate, nullptr, out + column, n);
    }
  }
}

#endif

// out (end - begin, n) = Σ over rows of columns[begin:end]ᵀ dz, in ascending order of the rows.
template <typename scalar_t>
void sum_outer_products(int64_t rows, const Columns<scalar_t>& columns, int64_t begin, int64_t end, const scalar_t* dz,
                        int64_t n, [[maybe_unused]] bool bfloat16, scalar_t* out, GradientScratch<scalar_t>& scratch) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const int64_t count = end - begin;
#if SAML_HAS_TILES
  if constexpr (kHasTiles<scalar_t>) {
    // Below a tile in any direction most of it would be zeros.
    if (std::min({rows, count, n}) >= kTileSide) {
      sum_outer_products_in_tiles(rows, columns, begin, end, dz, n, bfloat16 ? 1 : kFloatParts, out, scratch);
      return;
    }
  }
#endif
  alignas(64) scalar_t slice[kGradientItemRows<scalar_t> + kTileRows];
  alignas(64) scalar_t edge[kTileRows * panel_width];
  std::fill_n(out, count * n, scalar_t(0));
  for (int64_t start = 0; start < rows; start += kGradientChunk) {
    const int64_t chunk = std::min(kGradientChunk, rows - start);
    for (int64_t r = 0; r < chunk; ++r) {
      columns.copy(start + r, begin, end, slice);
      for (int64_t i = 0; i < count; i += kTileRows) {
        std::copy_n(slice + i, kTileRows, scratch.input + (i * kGradientChunk) + r * kTileRows);
      }
    }
    for (int64_t column = 0; column < n; column += panel_width) {
      const int64_t width = std::min(panel_width, n - column);
      const bool whole = width == panel_width;
      pack_panel(dz + start * n + column, n, chunk, width, scratch.panel);
      for (int64_t i = 0; i < count; i += kTileRows) {
        const int64_t block = std::min<int64_t>(kTileRows, count - i);
        const Operand<scalar_t> a{scratch.input + i * kGradientChunk, 1, kTileRows, chunk};
        const Operand<scalar_t> nothing{a.data, 0, 0, 0};
        scalar_t* target = out + i * n + column;
        const auto tile = kRegisterTiles<kVectors, scalar_t>[block - 1];
        if (whole) {
          tile(a, nothing, scratch.panel, panel_width, nullptr, target, n, true);
          continue;
        }
        for (int64_t r = 0; r < block; ++r) {
          std::copy_n(target + r * n, width, edge + r * panel_width);
          std::fill(edge + r * panel_width + width, edge + (r + 1) * panel_width, scalar_t(0));
        }
        tile(a, nothing, scratch.panel, panel_width, nullptr, edge, panel_width, true);
        for (int64_t r = 0; r < block; ++r) {
          std::copy_n(edge + r * panel_width, width, target + r * n);
        }
      }
    }
  }
}

template <typename scalar_t>
void sum_rows(int64_t rows, int64_t n, const scalar_t* dz, scalar_t* out) {
  std::fill_n(out, n, scalar_t(0));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] += dz[r * n + i];
    }
  }
}

template <typename scalar_t>
void gradient_item(const Trunk<scalar_t>& trunk, const GradientItem& item, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  GradientScratch<scalar_t> scratch(pieces);
  const Layer<scalar_t>& layer = trunk.layers[item.layer];
  const Layer<scalar_t>* before = item.layer > 0 ? &trunk.layers[item.layer - 1] : nullptr;
  const int64_t k = item.scenario;
  const bool dense = item.kind == GradientItem::Kind::kAux;
  const int64_t first = dense ? 0 : trunk.offsets[k], rows = (dense ? trunk.rows : trunk.offsets[k + 1]) - first;

  Columns<scalar_t> columns{{nullptr, 0}, 0, {nullptr, 0}, 0};
  const scalar_t* dz = nullptr;
  scalar_t *out = nullptr, *bias = nullptr;
  int64_t n = 0, height = 0;
  switch (item.kind) {
    case GradientItem::Kind::kBranch: {
      n = layer.width;
      height = layer.in_width + layer.aux_width;
      if (before != nullptr) {
        const scalar_t* input = before->has_mutual_unit() ? before->mutual : before->own;
        columns.left = {input + first * layer.in_width, layer.in_width};
      } else {
        const int64_t ld = trunk.per_branch_input ? trunk.num_scenarios * layer.in_width : layer.in_width;
        columns.left = {trunk.x_local + first * ld + (trunk.per_branch_input ? k * layer.in_width : 0), ld};
      }
      columns.left_width = layer.in_width;
      if (layer.aux_width > 0) {
        columns.right = {layer.aux + first * layer.aux_width, layer.aux_width};
        columns.right_width = layer.aux_width;
      }
      dz = layer.grad_argument + first * n;
      out = layer.grad_weight + k * height * n;
      bias = layer.grad_bias + k * n;
      break;
    }
    case GradientItem::Kind::kAux:
      n = layer.aux_width;
      height = layer.aux_in;
      columns.left = {before != nullptr ? before->aux : trunk.x_global, height};
      columns.left_width = height;
      dz = layer.grad_aux_argument;
      out = layer.grad_aux_weight;
      bias = layer.grad_aux_bias;
      break;
    case GradientItem::Kind::kGate:
      n = layer.gate_width;
      height = layer.width;
      columns.left = {layer.own + first * height, height};
      columns.left_width = height;
      dz = layer.grad_gate_argument + first * n;
      out = layer.grad_gate_weight + k * height * n;
      bias = layer.grad_gate_bias + k * n;
      break;
  }
  sum_outer_products(rows, columns, item.begin, item.end, dz, n, trunk.own_bfloat16, out + item.begin * n, scratch);
  if (item.begin == 0) {
    sum_rows(rows, n, dz, bias);
  }
}
