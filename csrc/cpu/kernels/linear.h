// The trunk's products with a layer's weights, by the fastest way this capability has. Included once per capability,
// after the gemm files.
//
//     prepare(rows, A)      lays rows of a left factor out, once for all matrices they meet
//     product               C = bias + A W_i
//     transposed_product    dA = [dA +] dC W_iᵀ
//
// Rows are numbered within the tile of rows at hand; operands and results are given by their row 0.

template <typename scalar_t>
constexpr bool kHasTiles = SAML_HAS_TILES != 0 && std::is_same_v<scalar_t, float>;

// Hands out 64-byte aligned pieces of one block; with a null block it only counts.
template <typename scalar_t>
class Scratch {
 public:
  explicit Scratch(void* block) : block_(static_cast<char*>(block)) {}

  template <typename element_t = scalar_t>
  element_t* take(int64_t count) {
    char* piece = block_ == nullptr ? nullptr : block_ + bytes_;
    bytes_ += round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(element_t)), 64);
    return reinterpret_cast<element_t*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

template <typename scalar_t>
struct ProductScratch {
  scalar_t* panel = nullptr;
  scalar_t* rounded = nullptr;
  scalar_t* transposed = nullptr;
  uint16_t* tiles = nullptr;  // of the rows prepared last

  ProductScratch() = default;
  // For up to that many rows, and products over at most k terms.
  ProductScratch(int64_t rows, int64_t k, bool backward, Scratch<scalar_t>& scratch) {
    // Twice, as the kernel without a bfloat16 instruction packs a panel before it is packed again.
    panel = scratch.take(2 * (k + 2) * kPanel<scalar_t>);
    rounded = scratch.take(rows * (k + 2));
    if (backward) {
      transposed = scratch.take(k * round_up(rows, kPanel<scalar_t>));
    }
    if constexpr (kHasTiles<scalar_t>) {
      tiles = scratch.template take<uint16_t>(round_up(rows, 32) * round_up(k, 32) * kFloatParts);
    }
  }
};

template <typename element_t>
inline element_t* matrix_of(element_t* first, int64_t i, int64_t size) {
  return first == nullptr ? nullptr : first + i * size;
}

template <typename scalar_t>
int64_t panels_size(const Weights<scalar_t>& weights) {
  return weights.k() * round_up(weights.n, kPanel<scalar_t>);
}

#if SAML_HAS_TILES

template <typename scalar_t>
int64_t bfloat16_panels_size(const Weights<scalar_t>& weights) {
  return tiles_size(weights.n, weights.k(), weights.parts);
}

template <typename scalar_t>
int64_t transposed_panels_size(const Weights<scalar_t>& weights) {
  return tiles_size(weights.k(), weights.n, weights.parts);
}

inline void lay_out_bfloat16(const Weights<float>& weights, int64_t i) {
  const TileSource matrix = one_matrix(weights.matrix(i), weights.n, weights.n, weights.k());
  if (weights.bfloat16_panels != nullptr) {
    lay_out_columns<false>(matrix, 0, weights.n, weights.parts,
                           weights.bfloat16_panels + i * bfloat16_panels_size(weights));
  }
  if (weights.transposed_bfloat16_panels != nullptr) {
    lay_out_right_transposed(matrix, weights.parts,
                             weights.transposed_bfloat16_panels + i * transposed_panels_size(weights));
  }
}

inline void prepare(int64_t first, int64_t last, const Operand<float>& a1, const Operand<float>& a2,
                    const Weights<float>& weights, ProductScratch<float>& scratch) {
  if (weights.bfloat16_panels != nullptr) {
    const TileSource source{a1.data, a1.row_stride, a1.k, a2.data, a2.row_stride, a2.k, last};
    lay_out_left(source, first, last, weights.parts, scratch.tiles);
  }
}

inline bool tile_product(bool bfloat16, int64_t first, int64_t last, const Weights<float>& weights, int64_t i, float* c,
                         int64_t ldc, ProductScratch<float>& scratch) {
  if (weights.bfloat16_panels == nullptr) {
    return false;
  }
  const TileFactors factors{scratch.tiles, weights.bfloat16_panels + i * bfloat16_panels_size(weights),
                            tiles_of(weights.k(), kTileDepth), weights.parts};
  multiply_tiles(factors, bfloat16 ? 1 : weights.parts, first, last, weights.n, Sums::kFromBias,
                 weights.bias + i * weights.n, c, ldc);
  return true;
}

inline bool transposed_tile_product(int64_t first, int64_t last, int64_t begin, const Weights<float>& weights,
                                    int64_t i, const float* dc, int64_t ldc, float* da, int64_t lda, bool accumulate,
                                    ProductScratch<float>& scratch) {
  if (weights.transposed_bfloat16_panels == nullptr) {
    return false;
  }
  lay_out_left(one_matrix(dc, ldc, weights.n, last), first, last, weights.parts, scratch.tiles);
  TileFactors factors{scratch.tiles, weights.transposed_bfloat16_panels + i * transposed_panels_size(weights),
                      tiles_of(weights.n, kTileDepth), weights.parts};
  // From the beginning of a tile: the columns before `begin` are nobody's.
  const int64_t start = begin / kTileSide * kTileSide;
  factors.right += start / kTileSide * factors.side_stride();
  multiply_tiles(factors, weights.parts, first, last, weights.k() - start,
                 accumulate ? Sums::kAccumulate : Sums::kFromBias, nullptr, da + start, lda);
  return true;
}

#else

template <typename scalar_t>
int64_t bfloat16_panels_size(const Weights<scalar_t>& weights) {
  return (round_up(weights.k1, 2) + round_up(weights.k2, 2)) * round_up(weights.n, kPanel<scalar_t>);
}

template <typename scalar_t>
int64_t transposed_panels_size(const Weights<scalar_t>&) {
  return 0;
}

template <typename scalar_t>
inline void lay_out_bfloat16(const Weights<scalar_t>& weights, int64_t i) {
  if (weights.bfloat16_panels != nullptr) {
    pack_all_pairs(weights.matrix(i), weights.k1, weights.k2, weights.n,
                   weights.bfloat16_panels + i * bfloat16_panels_size(weights));
  }
}

#endif

template <typename scalar_t>
void lay_out(const PanelItem<scalar_t>& item) {
  const Weights<scalar_t>& weights = *item.weights;
  if (weights.panels != nullptr) {
    pack_panels(weights.matrix(item.matrix), weights.k(), weights.n,
                weights.panels + item.matrix * panels_size(weights));
  }
  if constexpr (std::is_same_v<scalar_t, float>) {
    lay_out_bfloat16(weights, item.matrix);
  }
}

// Rows first .. last of [A1 ; A2], for the products with matrices of these weights that follow.
template <typename scalar_t>
inline void prepare_rows(int64_t first, int64_t last, const Operand<scalar_t>& a1, const Operand<scalar_t>& a2,
                         const Weights<scalar_t>& weights, ProductScratch<scalar_t>& scratch) {
  if constexpr (kHasTiles<scalar_t>) {
    prepare(first, last, a1, a2, weights, scratch);
  }
}

// Rows first .. last of C = bias + [A1 ; A2] W_i, of factors rounded to bfloat16 if asked. These rows, or more, have
// been prepared.
template <typename scalar_t>
inline void product(bool bfloat16, int64_t first, int64_t last, const Operand<scalar_t>& a1,
                    const Operand<scalar_t>& a2, const Weights<scalar_t>& weights, int64_t i, scalar_t* c, int64_t ldc,
                    ProductScratch<scalar_t>& scratch) {
  const int64_t rows = last - first, n = weights.n;
  if (rows == 0) {
    return;
  }
  if constexpr (kHasTiles<scalar_t>) {
    if (tile_product(bfloat16, first, last, weights, i, c, ldc, scratch)) {
      return;
    }
  }
  const scalar_t* bias = weights.bias + i * n;
  scalar_t* target = c + first * ldc;
  const Operand<scalar_t> left = a1.from_row(first), right = a2.from_row(first);
  if (bfloat16) {
    const uint16_t* panels = matrix_of(weights.bfloat16_panels, i, bfloat16_panels_size<scalar_t>(weights));
    multiply_bfloat16(rows, n, left, right, weights.matrix(i), n, panels, bias, target, ldc, scratch.panel,
                      scratch.rounded);
  } else {
    const scalar_t* panels = matrix_of(weights.panels, i, panels_size<scalar_t>(weights));
    multiply<scalar_t>(rows, n, left, right, weights.matrix(i), n, panels, bias, target, ldc, scratch.panel);
  }
}

// Columns begin .. k of rows first .. last of dA = [dA +] dC W_iᵀ for W_i (k, n).
template <typename scalar_t>
inline void transposed_product(int64_t first, int64_t last, int64_t begin, const Weights<scalar_t>& weights, int64_t i,
                               const scalar_t* dc, int64_t ldc, scalar_t* da, int64_t lda, bool accumulate,
                               ProductScratch<scalar_t>& scratch) {
  if (first == last) {
    return;
  }
  if constexpr (kHasTiles<scalar_t>) {
    if (transposed_tile_product(first, last, begin, weights, i, dc, ldc, da, lda, accumulate, scratch)) {
      return;
    }
  }
  const int64_t n = weights.n;
  multiply_transposed(last - first, weights.k() - begin, n, dc + first * ldc, ldc, weights.matrix(i) + begin * n, n,
                      da + first * lda + begin, lda, accumulate, scratch.transposed);
}
