// Units of two bfloat16 in 32 bits: two neighbours of k, as the dot-product instruction and the tile unit multiply them
// and sum in float32. Included once per capability, after tile.h.

// A tile is 16 rows of 16 units, 1 KiB.
constexpr int64_t kTileSide = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileElements = kTileSide * kTileDepth;

// Terms of a panel of the transpose of n columns, which are transposed a tile at a time.
inline int64_t transposed_terms(int64_t n) { return round_up(n, kTileDepth); }

// Terms of a row of two parts, of each an even number.
inline int64_t unit_terms(int64_t k1, int64_t k2) { return round_up(k1, 2) + round_up(k2, 2); }

#if SAML_HAS_BFLOAT16_DOT

// 16 columns of a row, zero outside of the matrix.
template <typename element_t>
inline __m512 load_16(const Concatenated<element_t>& source, int64_t row, int64_t column) {
  const auto& [left, right] = source;
  if (row >= source.rows()) {
    return _mm512_setzero_ps();
  }
  if (column + 16 <= left.cols) {
    return (__m512)load_widened(left.row(row) + column);
  }
  if (column >= left.cols && column + 16 <= source.cols()) {
    return (__m512)load_widened(right.row(row) + (column - left.cols));
  }
  alignas(64) float values[16] = {};
  for (int64_t i = column; i < std::min(column + 16, source.cols()); ++i) {
    values[i - column] = widened(i < left.cols ? left.row(row)[i] : right.row(row)[i - left.cols]);
  }
  return _mm512_load_ps(values);
}

inline __m512 widen(__m256bh x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16));
}

// Units of two rows.
inline __m512i units_of(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// The same of numbers that are rounded.
inline __m512i units_of(__m512 even, __m512 odd) {
  return units_of((__m256i)_mm512_cvtneps_pbh(even), (__m256i)_mm512_cvtneps_pbh(odd));
}

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// Parts of a number, each the rounding of what the ones before it leave, stand kTileElements apart.

// 16 units of one row: its columns column .. column + 32.
template <typename element_t>
inline void store_row_units(const Concatenated<element_t>& source, int64_t row, int64_t column, int64_t parts,
                            uint16_t* target) {
  if constexpr (std::is_same_v<element_t, Bfloat16>) {
    if (parts == 1 && row < source.rows() && column + kTileDepth <= source.left.cols) {
      std::memcpy(target, source.left.row(row) + column, kTileDepth * sizeof(Bfloat16));
      return;
    }
  }
  __m512 low = load_16(source, row, column), high = load_16(source, row, column + 16);
  for (int64_t part = 0; part < parts; ++part) {
    const __m256bh low_part = _mm512_cvtneps_pbh(low), high_part = _mm512_cvtneps_pbh(high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + part * kTileElements), (__m256i)low_part);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + part * kTileElements + 16), (__m256i)high_part);
    low = _mm512_sub_ps(low, widen(low_part));
    high = _mm512_sub_ps(high, widen(high_part));
  }
}

// 16 units of two rows, each from a column of column .. column + 16.
template <typename element_t>
inline void store_pair_units(const Concatenated<element_t>& source, int64_t row, int64_t column, int64_t parts,
                             uint16_t* target) {
  if constexpr (std::is_same_v<element_t, Bfloat16>) {
    if (parts == 1 && row + 1 < source.rows() && column + kTileSide <= source.left.cols) {
      __m256i even, odd;
      std::memcpy(&even, source.left.row(row) + column, sizeof(even));
      std::memcpy(&odd, source.left.row(row + 1) + column, sizeof(odd));
      _mm512_storeu_si512(target, units_of(even, odd));
      return;
    }
  }
  __m512 even = load_16(source, row, column), odd = load_16(source, row + 1, column);
  for (int64_t part = 0; part < parts; ++part) {
    const __m256bh even_part = _mm512_cvtneps_pbh(even), odd_part = _mm512_cvtneps_pbh(odd);
    _mm512_storeu_si512(target + part * kTileElements, units_of((__m256i)even_part, (__m256i)odd_part));
    even = _mm512_sub_ps(even, widen(even_part));
    odd = _mm512_sub_ps(odd, widen(odd_part));
  }
}

// A tile, its rows ld bfloat16 apart, transposed in place.
inline void transpose_units(uint16_t* tile, int64_t ld) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_si512(tile + i * ld);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + c] holds, in 128-bit lane q, column 4 q + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(tile + c * ld, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(tile + (4 + c) * ld, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(tile + (8 + c) * ld, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(tile + (12 + c) * ld, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

#endif
