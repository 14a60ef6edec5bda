// The same products with both factors rounded to bfloat16 and summed in float32. Included once per capability, after
// gemm_float.h. Where the dot-product instruction is missing the rounded factors go through the float kernel.

inline uint16_t round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding must not turn a NaN into an infinity.
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float rounded_to_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(round_to_bfloat16(x)) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

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

template <int rows>
void register_tile_pairs(const uint16_t* a, int64_t row_stride, int64_t pairs, const uint16_t* b, const float* bias,
                         float* c, int64_t ldc) {
  vec<float> acc[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = bias != nullptr ? load(bias + v * kLanes<float>) : vec<float>{};
    }
  }
  multiply_add_pairs<rows, kVectors>(acc, a, row_stride, pairs, b);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(c + r * ldc + v * kLanes<float>, acc[r][v]);
    }
  }
}

using RegisterTilePairs = void (*)(const uint16_t*, int64_t, int64_t, const uint16_t*, const float*, float*, int64_t);

template <int... rows>
constexpr std::array<RegisterTilePairs, sizeof...(rows)> register_tiles_pairs(std::integer_sequence<int, rows...>) {
  return {&register_tile_pairs<rows + 1>...};
}

constexpr auto kRegisterTilesPairs = register_tiles_pairs(std::make_integer_sequence<int, kTileRows>{});

// Rows of a factor as bfloat16, padded to an even k with a zero.
inline void round_rows(int64_t rows, const Operand<float>& a, uint16_t* target, int64_t ld) {
  const int64_t padded = round_up(a.k, 2);
  for (int64_t r = 0; r < rows; ++r) {
    const float* source = a.data + r * a.row_stride;
    uint16_t* row = target + r * ld;
    for (int64_t k = 0; k < a.k; ++k) {
      row[k] = round_to_bfloat16(source[k]);
    }
    std::fill(row + a.k, row + padded, uint16_t(0));
  }
}

inline void pack_pairs(const float* b, int64_t ldb, int64_t k, int64_t width, uint16_t* panel) {
  constexpr int64_t panel_width = kPanel<float>;
  for (int64_t i = 0; i < k; i += 2) {
    uint16_t* target = panel + i * panel_width;
    const float* first = b + i * ldb;
    const bool pair = i + 1 < k;
    for (int64_t v = 0; v < panel_width; v += 16) {
      const int64_t lanes = std::clamp<int64_t>(width - v, 0, 16);
      const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1u);
      const __m512 low = _mm512_maskz_loadu_ps(mask, first + v);
      const __m512 high = pair ? _mm512_maskz_loadu_ps(mask, first + ldb + v) : _mm512_setzero_ps();
      // Lane n of the result holds (low[n], high[n]).
      const __m512i low_bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
      const __m512i high_bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16);
      _mm512_storeu_si512(target + 2 * v, _mm512_or_si512(low_bits, high_bits));
    }
  }
}

inline void pack_all_pairs(const float* b, int64_t k1, int64_t k2, int64_t n, uint16_t* panels) {
  const int64_t first = round_up(k1, 2), k = first + round_up(k2, 2);
  for (int64_t column = 0; column < n; column += kPanel<float>) {
    const int64_t width = std::min(kPanel<float>, n - column);
    pack_pairs(b + column, n, k1, width, panels + column * k);
    pack_pairs(b + k1 * n + column, n, k2, width, panels + column * k + first * kPanel<float>);
  }
}

// C (rows, n) = bias + [A1 ; A2] B with rounded factors. a_space holds rows * (a1.k + a2.k + 2) bfloat16; panels are
// the rounded ones of B, or null, and then panel_space holds one.
inline void multiply_bfloat16(int64_t rows, int64_t n, const Operand<float>& a1, const Operand<float>& a2,
                              const float* b, int64_t ldb, const uint16_t* panels, const float* bias, float* c,
                              int64_t ldc, float* panel_space, float* a_space) {
  constexpr int64_t panel_width = kPanel<float>;
  uint16_t* panel = reinterpret_cast<uint16_t*>(panel_space);
  uint16_t* a = reinterpret_cast<uint16_t*>(a_space);
  const int64_t first = round_up(a1.k, 2), second = round_up(a2.k, 2), ld = first + second;
  round_rows(rows, a1, a, ld);
  round_rows(rows, a2, a + first, ld);
  alignas(64) float edge[kTileRows * panel_width];
  alignas(64) float edge_bias[panel_width] = {};
  for (int64_t column = 0; column < n; column += panel_width) {
    const int64_t width = std::min(panel_width, n - column);
    const bool whole = width == panel_width;
    const uint16_t* source = panels != nullptr ? panels + column * ld : panel;
    if (panels == nullptr) {
      pack_pairs(b + column, ldb, a1.k, width, panel);
      pack_pairs(b + a1.k * ldb + column, ldb, a2.k, width, panel + first * panel_width);
    }
    std::copy_n(bias + column, width, edge_bias);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - row);
      float* target = c + row * ldc + column;
      kRegisterTilesPairs[count - 1](a + row * ld, ld, ld / 2, source, edge_bias, whole ? target : edge,
                                     whole ? ldc : panel_width);
      for (int64_t r = 0; !whole && r < count; ++r) {
        std::copy_n(edge + r * panel_width, width, target + r * ldc);
      }
    }
  }
}

#else

inline void multiply_bfloat16(int64_t rows, int64_t n, const Operand<float>& a1, const Operand<float>& a2,
                              const float* b, int64_t ldb, const uint16_t*, const float* bias, float* c, int64_t ldc,
                              float* panel, float* a_space) {
  constexpr int64_t panel_width = kPanel<float>;
  const int64_t k = a1.k + a2.k;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      const float value = i < a1.k ? a1.data[r * a1.row_stride + i] : a2.data[r * a2.row_stride + i - a1.k];
      a_space[r * k + i] = rounded_to_bfloat16(value);
    }
  }
  const Operand<float> whole{a_space, k, 1, k}, nothing{a_space, 0, 0, 0};
  alignas(64) float bias_panel[panel_width] = {};
  float* packed = panel + k * panel_width;
  for (int64_t column = 0; column < n; column += panel_width) {
    const int64_t width = std::min(panel_width, n - column);
    pack_panel(b + column, ldb, k, width, packed);
    for (int64_t i = 0; i < k * panel_width; ++i) {
      packed[i] = rounded_to_bfloat16(packed[i]);
    }
    std::copy_n(bias + column, width, bias_panel);
    multiply<float>(rows, width, whole, nothing, packed, panel_width, nullptr, bias_panel, c + column, ldc, panel);
  }
}

inline void pack_all_pairs(const float*, int64_t, int64_t, int64_t, uint16_t*) {}

#endif

// bfloat16 factors exist beside float only: a double trunk never asks for them.
inline void multiply_bfloat16(int64_t rows, int64_t n, const Operand<double>& a1, const Operand<double>& a2,
                              const double* b, int64_t ldb, const uint16_t*, const double* bias, double* c, int64_t ldc,
                              double* panel, double*) {
  multiply<double>(rows, n, a1, a2, b, ldb, nullptr, bias, c, ldc, panel);
}

inline void pack_all_pairs(const double*, int64_t, int64_t, int64_t, uint16_t*) {}
