// The same products with both factors rounded to bfloat16 and summed in float32. Included once per capability, after
// gemm_float.h and units.h. Where the dot-product instruction is missing the rounded factors go through the float
// kernel.

#if SAML_HAS_BFLOAT16_DOT

// Of a factor A in units: unit k of a row stands at data[row * row_stride + k * k_stride].
using UnitOperand = Operand<uint16_t>;

// Units of consecutive k stand in every lane of a panel, as the instruction reads them.
template <int rows, int vectors>
inline __attribute__((always_inline)) void multiply_add_units(vec<float> (&acc)[rows][vectors], const UnitOperand& a,
                                                              const uint16_t* b) {
  const uint16_t* column = a.data;
  for (int64_t k = 0; k < a.k; ++k, column += a.k_stride, b += 2 * kPanel<float>) {
    __m512i factor[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      factor[v] = _mm512_loadu_si512(b + v * 2 * kLanes<float>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      int32_t unit;
      std::memcpy(&unit, column + r * a.row_stride, sizeof(unit));
      const __m512i value = _mm512_set1_epi32(unit);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)value, (__m512bh)factor[v]);
      }
    }
  }
}

// C (rows, kPanel) = start + A B for a packed panel of B. Rows of start are start_ld apart: a bias with 0, or C itself.
template <int rows>
void register_tile_units(const UnitOperand& a, const uint16_t* b, const float* start, int64_t start_ld, float* c,
                         int64_t ldc) {
  vec<float> acc[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = load(start + r * start_ld + v * kLanes<float>);
    }
  }
  multiply_add_units<rows, kVectors>(acc, a, b);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(c + r * ldc + v * kLanes<float>, acc[r][v]);
    }
  }
}

using RegisterTileUnits = void (*)(const UnitOperand&, const uint16_t*, const float*, int64_t, float*, int64_t);

template <int... rows>
constexpr std::array<RegisterTileUnits, sizeof...(rows)> register_tiles_units(std::integer_sequence<int, rows...>) {
  return {&register_tile_units<rows + 1>...};
}

constexpr auto kRegisterTilesUnits = register_tiles_units(std::make_integer_sequence<int, kRegisterTileRows>{});

// C = [C if accumulate, else bias] + A B in one register tile, through a buffer where C is narrower; bias is not.
inline void multiply_tile_units(const UnitOperand& a, const uint16_t* b, const float* bias, const MatrixView<float>& c,
                                bool accumulate) {
  constexpr int64_t panel_width = kPanel<float>;
  const RegisterTileUnits tile = kRegisterTilesUnits[c.rows - 1];
  if (c.cols == panel_width) {
    tile(a, b, accumulate ? c.data : bias, accumulate ? c.ld : 0, c.data, c.ld);
    return;
  }
  alignas(64) float edge[kRegisterTileRows * panel_width];
  for (int64_t r = 0; accumulate && r < c.rows; ++r) {
    std::copy_n(c.row(r), c.cols, edge + r * panel_width);
    std::fill(edge + r * panel_width + c.cols, edge + (r + 1) * panel_width, 0.0f);
  }
  tile(a, b, accumulate ? edge : bias, accumulate ? panel_width : 0, edge, panel_width);
  for (int64_t r = 0; r < c.rows; ++r) {
    std::copy_n(edge + r * panel_width, c.cols, c.row(r));
  }
}

// A in bfloat16, the rows padded to an even k with a zero and ld apart.
inline void round_rows(const MatrixView<const float>& a, uint16_t* target, int64_t ld) {
  const int64_t padded = round_up(a.cols, 2);
  for (int64_t r = 0; r < a.rows; ++r) {
    const float* source = a.row(r);
    uint16_t* row = target + r * ld;
    for (int64_t k = 0; k < a.cols; ++k) {
      row[k] = round_to(source[k], Bfloat16()).bits;
    }
    std::fill(row + a.cols, row + padded, uint16_t(0));
  }
}

// Up to kPanel columns of B, padded to an even k with zeros.
template <typename element_t>
inline void pack_units(const MatrixView<const element_t>& b, uint16_t* panel) {
  constexpr int64_t ahead = 16;
  const Concatenated<element_t> source{b};
  for (int64_t i = 0; i < b.rows; i += 2) {
    // Every row is a line far from the one before it.
    for (int64_t r = i + ahead; r < std::min(i + ahead + 2, b.rows); ++r) {
      __builtin_prefetch(b.row(r));
    }
    for (int64_t v = 0; v < kPanel<float>; v += kTileSide) {
      store_pair_units(source, i, v, 1, panel + i * kPanel<float> + 2 * v);
    }
  }
}

// The same of [B1 ; B2], of which B1 has k1 rows; each part is padded.
template <typename element_t>
inline void pack_units(const MatrixView<const element_t>& b, int64_t k1, uint16_t* panel) {
  pack_units(b.row_range(0, k1), panel);
  pack_units(b.row_range(k1, b.rows), panel + round_up(k1, 2) * kPanel<float>);
}

template <typename element_t>
inline void pack_all_units(const MatrixView<const element_t>& b, int64_t k1, uint16_t* panels) {
  const int64_t k = unit_terms(k1, b.rows - k1);
  for (int64_t column = 0; column < b.cols; column += kPanel<float>) {
    pack_units(b.columns(column, std::min(kPanel<float>, b.cols - column)), k1, panels + column * k);
  }
}

// Of up to kPanel rows of B, a panel of Bᵀ.
template <typename element_t>
inline void pack_transposed_units(const MatrixView<const element_t>& b, uint16_t* panel) {
  constexpr int64_t ahead = 4 * kTileDepth;
  const Concatenated<element_t> source{b};
  for (int64_t k = 0; k < b.cols; k += kTileDepth) {
    for (int64_t side = 0; side < kPanel<float>; side += kTileSide) {
      uint16_t* tile = panel + k * kPanel<float> + 2 * side;
      // So many rows at once are more than the processor guesses.
      for (int64_t r = side; k + ahead < b.cols && r < std::min(side + kTileSide, b.rows); ++r) {
        __builtin_prefetch(b.row(r) + k + ahead);
      }
      for (int64_t r = 0; r < kTileSide; ++r) {
        store_row_units(source, side + r, k, 1, tile + r * 2 * kPanel<float>);
      }
      transpose_units(tile, 2 * kPanel<float>);
    }
  }
}

template <typename element_t>
inline void pack_all_transposed_units(const MatrixView<const element_t>& b, uint16_t* panels) {
  for (int64_t row = 0; row < b.rows; row += kPanel<float>) {
    pack_transposed_units(b.row_range(row, std::min(row + kPanel<float>, b.rows)),
                          panels + row * transposed_terms(b.cols));
  }
}

// C = [C if accumulate, or bias, or 0] + A B for A in units, row by row. panel_of(column, width) gives B's panels.
template <typename PanelOf>
inline void multiply_units(const MatrixView<const uint16_t>& a, const PanelOf& panel_of, const float* bias,
                           const MatrixView<float>& c, bool accumulate) {
  constexpr int64_t panel_width = kPanel<float>;
  alignas(64) float panel_bias[panel_width] = {};
  for (int64_t column = 0; column < c.cols; column += panel_width) {
    const int64_t width = std::min(panel_width, c.cols - column);
    const uint16_t* panel = panel_of(column, width);
    if (bias != nullptr) {
      std::copy_n(bias + column, width, panel_bias);
    }
    for (int64_t row = 0; row < c.rows; row += kRegisterTileRows) {
      const int64_t end = std::min(row + kRegisterTileRows, c.rows);
      multiply_tile_units({a.row(row), a.ld, 2, a.cols / 2}, panel, panel_bias,
                          c.row_range(row, end).columns(column, width), accumulate);
    }
  }
}

// Rows of [A1 ; A2] in units, unit_terms apart.
inline void round_rows(const Concatenated<float>& a, Range rows, uint16_t* target) {
  const int64_t terms = unit_terms(a.left.cols, a.right.cols);
  uint16_t* first = target + rows.begin * terms;
  round_rows(a.left.row_range(rows.begin, rows.end), first, terms);
  round_rows(a.right.row_range(rows.begin, rows.end), first + round_up(a.left.cols, 2), terms);
}

// C = bias + [A1 ; A2] B with rounded factors: A in units, of which A1 has k1 columns. panels are the rounded ones of
// B, or null, and then panel_space holds one.
inline void multiply_bfloat16(const MatrixView<const uint16_t>& a, int64_t k1, const StoredMatrix<const float>& b,
                              const uint16_t* panels, const float* bias, const MatrixView<float>& c,
                              float* panel_space) {
  uint16_t* panel = reinterpret_cast<uint16_t*>(panel_space);
  const auto panel_of = [&](int64_t column, int64_t width) -> const uint16_t* {
    if (panels != nullptr) {
      return panels + column * a.cols;
    }
    with_stored_elements<float>(b.columns(column, width), [&](const auto& columns) { pack_units(columns, k1, panel); });
    return panel;
  };
  multiply_units(a, panel_of, bias, c, false);
}

// dA = [dA +] dC Wᵀ with rounded factors. a_space holds rows * (dc.cols + 1) bfloat16; panels are the rounded ones of
// Wᵀ, or null, and then panel_space holds one.
inline void multiply_transposed_bfloat16(const MatrixView<const float>& dc, const StoredMatrix<const float>& w,
                                         const uint16_t* panels, const MatrixView<float>& da, bool accumulate,
                                         float* panel_space, float* a_space) {
  uint16_t *panel = reinterpret_cast<uint16_t*>(panel_space), *rounded = reinterpret_cast<uint16_t*>(a_space);
  const int64_t k = round_up(dc.cols, 2);
  round_rows(dc, rounded, k);
  const auto panel_of = [&](int64_t row, int64_t width) -> const uint16_t* {
    if (panels != nullptr) {
      return panels + row * transposed_terms(dc.cols);
    }
    with_stored_elements<float>(w.row_range(row, row + width),
                                [&](const auto& rows) { pack_transposed_units(rows, panel); });
    return panel;
  };
  multiply_units({rounded, dc.rows, k, k}, panel_of, nullptr, da, accumulate);
}

#else

inline void round_values(const float* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = widened(round_to(source[i], Bfloat16()));
  }
}

// Rows of [A1 ; A2], a.cols() apart.
inline void round_rows(const Concatenated<float>& a, Range rows, float* target) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    float* row = target + r * a.cols();
    round_values(a.left.row(r), a.left.cols, row);
    round_values(a.right.row(r), a.right.cols, row + a.left.cols);
  }
}

// panels: those of a B that stands in bfloat16, or null.
inline void multiply_bfloat16(const Concatenated<float>& a, const StoredMatrix<const float>& b, const float* panels,
                              const float* bias, const MatrixView<float>& c, float* panel, float* a_space) {
  constexpr int64_t panel_width = kPanel<float>;
  const int64_t k = a.cols();
  round_rows(a, {0, a.rows()}, a_space);
  const Concatenated<float> rounded{{a_space, a.rows(), k, k}};
  if (b.storage == Storage::kBfloat16) {
    multiply<float>(rounded, b, panels, bias, c, panel);
    return;
  }
  alignas(64) float bias_panel[panel_width] = {};
  float* packed = panel + k * panel_width;
  for (int64_t column = 0; column < c.cols; column += panel_width) {
    const int64_t width = std::min(panel_width, c.cols - column);
    pack_panel(b.columns(column, width), packed);
    round_values(packed, k * panel_width, packed);
    std::copy_n(bias + column, width, bias_panel);
    multiply<float>(rounded, MatrixView<const float>{packed, k, width, panel_width}, nullptr, bias_panel,
                    c.columns(column, width), panel);
  }
}

#endif
