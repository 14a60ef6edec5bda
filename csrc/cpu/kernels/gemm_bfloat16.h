// The same products with both factors rounded to bfloat16 and summed in float32. Included once per capability, after
// gemm_float.h. Where the dot-product instruction is missing the rounded factors go through the float kernel.

#if SAML_HAS_BFLOAT16_DOT

// Pairs of consecutive k stand together in every lane, as the instruction reads them.
template <int rows, int vectors>
inline __attribute__((always_inline)) void multiply_add_pairs(vec<float> (&acc)[rows][vectors], const uint16_t* a,
                                                              int64_t row_stride, int64_t pairs, const uint16_t* b) {
  for (int64_t k = 0; k < pairs; ++k, a += 2, b += 2 * kPanel<float>) {
    __m512i factor[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      factor[v] = _mm512_loadu_si512(b + v * 2 * kLanes<float>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * row_stride, sizeof(pair));
      const __m512i value = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)value, (__m512bh)factor[v]);
      }
    }
  }
}

// C (rows, kPanel) = bias + A B for a packed panel of B.
template <int rows>
void register_tile_pairs(const MatrixView<const uint16_t>& a, const uint16_t* b, const float* bias, float* c,
                         int64_t ldc) {
  vec<float> acc[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = load(bias + v * kLanes<float>);
    }
  }
  multiply_add_pairs<rows, kVectors>(acc, a.data, a.ld, a.cols / 2, b);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(c + r * ldc + v * kLanes<float>, acc[r][v]);
    }
  }
}

using RegisterTilePairs = void (*)(const MatrixView<const uint16_t>&, const uint16_t*, const float*, float*, int64_t);

template <int... rows>
constexpr std::array<RegisterTilePairs, sizeof...(rows)> register_tiles_pairs(std::integer_sequence<int, rows...>) {
  return {&register_tile_pairs<rows + 1>...};
}

constexpr auto kRegisterTilesPairs = register_tiles_pairs(std::make_integer_sequence<int, kRegisterTileRows>{});

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

// The first count of 16 numbers, none if it is negative, and zeros.
template <typename element_t>
inline __m512 load_some(const element_t* p, int64_t count) {
  if (count >= 16) {
    return (__m512)load_widened(p);
  }
  alignas(64) float values[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    values[i] = widened(p[i]);
  }
  return _mm512_load_ps(values);
}

// Up to kPanel columns of B, padded to an even k with zeros.
template <typename element_t>
inline void pack_pairs(const MatrixView<const element_t>& b, uint16_t* panel) {
  constexpr int64_t panel_width = kPanel<float>;
  for (int64_t i = 0; i < b.rows; i += 2) {
    uint16_t* target = panel + i * panel_width;
    const element_t* first = b.row(i);
    for (int64_t v = 0; v < panel_width; v += 16) {
      const __m512 low = load_some(first + v, b.cols - v);
      const __m512 high = load_some(first + b.ld + v, i + 1 < b.rows ? b.cols - v : 0);
      // Lane n of the result holds (low[n], high[n]).
      const __m512i low_bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
      const __m512i high_bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16);
      _mm512_storeu_si512(target + 2 * v, _mm512_or_si512(low_bits, high_bits));
    }
  }
}

// The same of [B1 ; B2], of which B1 has k1 rows; each part is padded.
template <typename element_t>
inline void pack_pairs(const MatrixView<const element_t>& b, int64_t k1, uint16_t* panel) {
  pack_pairs(b.row_range(0, k1), panel);
  pack_pairs(b.row_range(k1, b.rows), panel + round_up(k1, 2) * kPanel<float>);
}

template <typename element_t>
inline void pack_all_pairs(const MatrixView<const element_t>& b, int64_t k1, uint16_t* panels) {
  const int64_t k = round_up(k1, 2) + round_up(b.rows - k1, 2);
  for (int64_t column = 0; column < b.cols; column += kPanel<float>) {
    pack_pairs(b.columns(column, std::min(kPanel<float>, b.cols - column)), k1, panels + column * k);
  }
}

// C = bias + [A1 ; A2] B with rounded factors. a_space holds rows * (a.cols() + 2) bfloat16; panels are the rounded
// ones of B, or null, and then panel_space holds one.
inline void multiply_bfloat16(const Concatenated<float>& a, const StoredMatrix<const float>& b, const uint16_t* panels,
                              const float* bias, const MatrixView<float>& c, float* panel_space, float* a_space) {
  constexpr int64_t panel_width = kPanel<float>;
  uint16_t* panel = reinterpret_cast<uint16_t*>(panel_space);
  uint16_t* rounded = reinterpret_cast<uint16_t*>(a_space);
  const int64_t first = round_up(a.left.cols, 2), k = first + round_up(a.right.cols, 2);
  round_rows(a.left, rounded, k);
  round_rows(a.right, rounded + first, k);
  alignas(64) float edge[kRegisterTileRows * panel_width];
  alignas(64) float edge_bias[panel_width] = {};
  for (int64_t column = 0; column < c.cols; column += panel_width) {
    const int64_t width = std::min(panel_width, c.cols - column);
    const bool whole = width == panel_width;
    const uint16_t* source = panels != nullptr ? panels + column * k : panel;
    if (panels == nullptr) {
      with_stored_elements<float>(b.columns(column, width),
                                  [&](const auto& columns) { pack_pairs(columns, a.left.cols, panel); });
    }
    std::copy_n(bias + column, width, edge_bias);
    for (int64_t row = 0; row < c.rows; row += kRegisterTileRows) {
      const int64_t count = std::min<int64_t>(kRegisterTileRows, c.rows - row);
      float* target = c.row(row) + column;
      kRegisterTilesPairs[count - 1]({rounded + row * k, count, k, k}, source, edge_bias, whole ? target : edge,
                                     whole ? c.ld : panel_width);
      for (int64_t r = 0; !whole && r < count; ++r) {
        std::copy_n(edge + r * panel_width, width, target + r * c.ld);
      }
    }
  }
}

#else

inline void round_values(const float* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = widened(round_to(source[i], Bfloat16()));
  }
}

// panels: those of a B that stands in bfloat16, or null.
inline void multiply_bfloat16(const Concatenated<float>& a, const StoredMatrix<const float>& b, const float* panels,
                              const float* bias, const MatrixView<float>& c, float* panel, float* a_space) {
  constexpr int64_t panel_width = kPanel<float>;
  const int64_t k = a.cols();
  for (int64_t r = 0; r < a.rows(); ++r) {
    float* row = a_space + r * k;
    round_values(a.left.row(r), a.left.cols, row);
    round_values(a.right.row(r), a.right.cols, row + a.left.cols);
  }
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
