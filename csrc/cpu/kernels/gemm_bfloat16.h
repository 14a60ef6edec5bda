// The same products with both factors rounded to bfloat16 and summed in float32. Included once per capability, after
// gemm_float.h and units.h. Where the dot-product instruction is missing the rounded factors go through the float
// kernel.

#if SAML_HAS_BFLOAT16_DOT

// Of a factor A in units: unit k of a row stands at data[row * row_stride + k * k_stride].
using UnitOperand = Operand<uint16_t>;

// acc += a b, a column of units of A times a row of units of B: units of consecutive k stand in every lane of a panel,
// as the instruction reads them.
template <int rows, int vectors>
inline __attribute__((always_inline)) void add_units(vec<float> (&acc)[rows][vectors], const uint16_t* column,
                                                     int64_t row_stride, const __m512i (&factor)[vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    int32_t unit;
    std::memcpy(&unit, column + r * row_stride, sizeof(unit));
    const __m512i value = _mm512_set1_epi32(unit);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)value, (__m512bh)factor[v]);
    }
  }
}

template <int rows, int vectors>
inline __attribute__((always_inline)) void add_units(vec<float> (&acc)[rows][vectors], const uint16_t* column,
                                                     int64_t row_stride, const uint16_t* b) {
  __m512i factor[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    factor[v] = _mm512_loadu_si512(b + v * 2 * kLanes<float>);
  }
  add_units(acc, column, row_stride, factor);
}

// acc += A B over a.k units. A tile of fewer rows asks for nothing, as it would take more code than time.
template <int rows, int vectors>
inline __attribute__((always_inline)) void multiply_add_units(vec<float> (&acc)[rows][vectors], const UnitOperand& a,
                                                              const uint16_t* b, Ahead& ahead) {
  constexpr int64_t width = 2 * kPanel<float>;
  const uint16_t* column = a.data;
  int64_t k = 0;
  for (; rows == kRegisterTileRows && k + kTermsAtOnce <= a.k; k += kTermsAtOnce) {
    ahead.ask();
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTermsAtOnce; ++i, column += a.k_stride, b += width) {
      add_units(acc, column, a.row_stride, b);
    }
  }
  for (; k < a.k; ++k, column += a.k_stride, b += width) {
    add_units(acc, column, a.row_stride, b);
  }
}

// Sums as C takes them: floats, or rounded to bfloat16. Subnormal numbers become 0 then, as they do in a product.
inline void store_sums(float* c, vec<float> sums) { store(c, sums); }

inline void store_sums(uint16_t* c, vec<float> sums) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)sums);
  std::memcpy(c, &rounded, sizeof(rounded));
}

template <int rows, int vectors, typename sum_t>
inline __attribute__((always_inline)) void end_units(vec<float> (&acc)[rows][vectors], sum_t* c, int64_t ldc,
                                                     float least) {
  clamp_sums(acc, least);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      store_sums(c + r * ldc + v * kLanes<float>, acc[r][v]);
    }
  }
}

// Asks for two rows further below: every row is a line far from the one before it. In the smallest cache so many would
// fall on the same few sets.
template <typename element_t>
inline void ask_for_pair(const MatrixView<const element_t>& b, int64_t row) {
  constexpr int64_t ahead = 32;
  for (int64_t r = row + ahead; r < std::min(row + ahead + 2, b.rows); ++r) {
    __builtin_prefetch(b.row(r), 0, 2);
  }
}

// C (rows, kPanel) = start + A B for a packed panel of B, or `least` where that is more. Rows of start are start_ld
// apart: a bias with 0, or C itself.
template <int rows, typename sum_t>
void register_tile_units(const UnitOperand& a, const uint16_t* b, const float* start, int64_t start_ld, sum_t* c,
                         int64_t ldc, float least, Ahead ahead) {
  vec<float> acc[rows][kVectors];
  ask_for_sums<rows, kPanel<float>>(c, ldc);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = load(start + r * start_ld + v * kLanes<float>);
    }
  }
  multiply_add_units<rows, kVectors>(acc, a, b, ahead);
  end_units(acc, c, ldc, least);
}

// The same of whole tiles of rows and a panel that stands in rows, of even number: it is laid out on the way.
template <typename sum_t>
void packing_tile_units(const UnitOperand& a, const MatrixView<const Bfloat16>& b, const float* bias, sum_t* c,
                        int64_t ldc, float least, uint16_t* panel, uint16_t* shared) {
  vec<float> acc[kRegisterTileRows][kVectors];
  ask_for_sums<kRegisterTileRows, kPanel<float>>(c, ldc);
#pragma GCC unroll 16
  for (int r = 0; r < kRegisterTileRows; ++r) {
    load_row(acc[r], bias);
  }
  const uint16_t* column = a.data;
  for (int64_t k = 0; k < a.k; ++k, column += a.k_stride, panel += 2 * kPanel<float>) {
    const Bfloat16 *even = b.row(2 * k), *odd = even + b.ld;
    ask_for_pair(b, 2 * k);
    __m512i factor[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      __m256i pair[2];
      std::memcpy(&pair[0], even + v * kLanes<float>, sizeof(pair[0]));
      std::memcpy(&pair[1], odd + v * kLanes<float>, sizeof(pair[1]));
      factor[v] = units_of(pair[0], pair[1]);
      _mm512_storeu_si512(panel + v * 2 * kLanes<float>, factor[v]);
    }
    if (shared != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store_for_others(reinterpret_cast<float*>(shared) + v * kLanes<float>, (vec<float>)factor[v]);
      }
      shared += 2 * kPanel<float>;
    }
    add_units(acc, column, a.row_stride, factor);
  }
  end_units(acc, c, ldc, least);
}

template <typename sum_t>
using RegisterTileUnits = void (*)(const UnitOperand&, const uint16_t*, const float*, int64_t, sum_t*, int64_t, float,
                                   Ahead);

template <typename sum_t, int... rows>
constexpr std::array<RegisterTileUnits<sum_t>, sizeof...(rows)> register_tiles_units(
    std::integer_sequence<int, rows...>) {
  return {&register_tile_units<rows + 1, sum_t>...};
}

template <typename sum_t>
constexpr auto kRegisterTilesUnits = register_tiles_units<sum_t>(std::make_integer_sequence<int, kRegisterTileRows>{});

// C = max(least, start + A B) in one register tile, through a buffer where C is narrower. start is C if `accumulate`,
// else the bias, which is not narrower. Floats only are added to.
template <typename sum_t>
inline void multiply_tile_units(const UnitOperand& a, const uint16_t* b, const float* bias, const MatrixView<sum_t>& c,
                                bool accumulate, float least, Ahead ahead) {
  constexpr int64_t panel_width = kPanel<float>;
  constexpr bool floats = std::is_same_v<sum_t, float>;
  const RegisterTileUnits<sum_t> tile = kRegisterTilesUnits<sum_t>[c.rows - 1];
  const float* start = bias;
  if (c.cols == panel_width) {
    if constexpr (floats) {
      start = accumulate ? c.data : bias;
    }
    tile(a, b, start, accumulate ? c.ld : 0, c.data, c.ld, least, ahead);
    return;
  }
  alignas(64) sum_t edge[kRegisterTileRows * panel_width];
  if constexpr (floats) {
    for (int64_t r = 0; accumulate && r < c.rows; ++r) {
      std::copy_n(c.row(r), c.cols, edge + r * panel_width);
      std::fill(edge + r * panel_width + c.cols, edge + (r + 1) * panel_width, 0.0f);
    }
    start = accumulate ? edge : bias;
  }
  tile(a, b, start, accumulate ? panel_width : 0, edge, panel_width, least, ahead);
  for (int64_t r = 0; r < c.rows; ++r) {
    std::copy_n(edge + r * panel_width, c.cols, c.row(r));
  }
}

inline void round_values(const float* source, int64_t count, uint16_t* target) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    store_sums(target + i, load(source + i));
  }
  for (; i < count; ++i) {
    stay_scalar();
    target[i] = round_to(source[i], Bfloat16()).bits;
  }
}

// A in bfloat16, the rows padded to an even k with a zero and ld apart. It may stand in bfloat16.
inline void round_rows(const StoredMatrix<const float>& a, uint16_t* target, int64_t ld) {
  const int64_t padded = round_up(a.cols, 2);
  for (int64_t r = 0; r < a.rows; ++r) {
    uint16_t* row = target + r * ld;
    if (a.storage == Storage::kBfloat16) {
      std::memcpy(row, a.at(r, 0), static_cast<size_t>(a.cols) * sizeof(*row));
    } else {
      round_values(a.view().row(r), a.cols, row);
    }
    std::fill(row + a.cols, row + padded, uint16_t(0));
  }
}

// Up to kPanel columns of B, padded to an even k with zeros.
template <typename element_t>
inline void pack_units(const MatrixView<const element_t>& b, uint16_t* panel) {
  const Concatenated<element_t> source{b};
  for (int64_t i = 0; i < b.rows; i += 2) {
    ask_for_pair(b, i);
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

// C = max(least, [C if accumulate, or bias, or 0] + A B) for A in units, row by row. A panel of B that is not laid out
// pack_panel(column, bias, columns of C, place) lays out, and returns how many rows of C it has computed with it;
// lines_of(column) are those that are read of one. `panel` holds one.
template <typename PackPanel, typename LinesOf, typename sum_t>
inline void multiply_units(const MatrixView<const uint16_t>& a, const Panels<uint16_t>& panels, uint16_t* panel,
                           const PackPanel& pack_panel, const LinesOf& lines_of, const float* bias,
                           const MatrixView<sum_t>& c, bool accumulate, float least) {
  constexpr int64_t panel_width = kPanel<float>;
  alignas(64) float panel_bias[panel_width] = {};
  const int64_t count = round_up(c.cols, panel_width) / panel_width, first = panels.begin(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = (first + i) % count * panel_width, following = (first + i + 1) % count * panel_width;
    const int64_t width = std::min(panel_width, c.cols - column);
    const MatrixView<sum_t> target = c.columns(column, width);
    if (bias != nullptr) {
      std::copy_n(bias + column, width, panel_bias);
    }
    const PanelPlace<uint16_t> place = panels.take(column, panel);
    int64_t row = 0;
    if (!place.laid_out) {
      row = pack_panel(column, panel_bias, target, place);
      place.share(a.cols * panel_width, row > 0);
    }
    Lines next = (i + 1 < count ? lines_of(following) : panels.following).or_none(place.data);
    for (; row < c.rows; row += kRegisterTileRows) {
      const int64_t end = std::min(row + kRegisterTileRows, c.rows);
      multiply_tile_units<sum_t>({a.row(row), a.ld, 2, a.cols / 2}, place.data, panel_bias, target.row_range(row, end),
                                 accumulate, least, next.next(a.cols / 2));
    }
  }
}

// Whether [A1 ; A2] stand in units.
inline bool stand_in_units(const Input<float>& a) {
  const auto& [left, right] = a;
  const bool one = right.cols == 0;
  const bool rounded = left.storage == Storage::kBfloat16 && (one || right.storage == Storage::kBfloat16);
  const bool whole_pairs = left.cols % 2 == 0 && right.cols % 2 == 0;
  return rounded && whole_pairs && (one || (right.data == left.at(0, left.cols) && right.ld == left.ld));
}

// Rows of [A1 ; A2] in units: where they stand so, or in the space, unit_terms apart.
inline MatrixView<const uint16_t> units_of_rows(const Input<float>& a, Range rows, uint16_t* space) {
  const auto& [left, right] = a;
  if (stand_in_units(a)) {
    return {static_cast<const uint16_t*>(left.data), left.rows, left.cols + right.cols, left.ld};
  }
  const int64_t terms = unit_terms(left.cols, right.cols);
  uint16_t* first = space + rows.begin * terms;
  round_rows(left.row_range(rows.begin, rows.end), first, terms);
  round_rows(right.row_range(rows.begin, rows.end), first + round_up(left.cols, 2), terms);
  return {space, left.rows, terms, terms};
}

// C = max(least, bias + [A1 ; A2] B) with rounded factors, in float or bfloat16: A in units, of which A1 has k1
// columns. panels are the rounded ones of B; panel_space holds one.
template <typename sum_t>
inline void multiply_bfloat16(const MatrixView<const uint16_t>& a, int64_t k1, const StoredMatrix<const float>& b,
                              const Panels<uint16_t>& panels, const float* bias, const MatrixView<sum_t>& c,
                              float* panel_space, float least) {
  const bool whole_pairs = k1 % 2 == 0 && b.rows % 2 == 0, on_the_way = whole_pairs && c.rows >= kRegisterTileRows;
  const auto pack = [&](int64_t column, const float* panel_bias, const MatrixView<sum_t>& target,
                        const PanelPlace<uint16_t>& place) -> int64_t {
    const StoredMatrix<const float> columns = b.columns(column, target.cols);
    if (on_the_way && columns.storage == Storage::kBfloat16 && target.cols == kPanel<float>) {
      const MatrixView<const Bfloat16> view{static_cast<const Bfloat16*>(columns.data), b.rows, target.cols, b.ld};
      packing_tile_units<sum_t>({a.data, a.ld, 2, a.cols / 2}, view, panel_bias, target.data, target.ld, least,
                                place.data, place.shared);
      return kRegisterTileRows;
    }
    with_stored_elements<float>(columns, [&](const auto& view) { pack_units(view, k1, place.data); });
    return 0;
  };
  const auto lines_of = [&](int64_t column) { return panels.lines(b, column, kPanel<float>); };
  multiply_units(a, panels, reinterpret_cast<uint16_t*>(panel_space), pack, lines_of, bias, c, false, least);
}

// dA = [dA +] dC Wᵀ with rounded factors. a_space holds rows * (dc.cols + 1) bfloat16; panels are the rounded ones of
// Wᵀ; panel_space holds one.
inline void multiply_transposed_bfloat16(const MatrixView<const float>& dc, const StoredMatrix<const float>& w,
                                         const Panels<uint16_t>& panels, const MatrixView<float>& da, bool accumulate,
                                         float* panel_space, float* a_space) {
  uint16_t *panel = reinterpret_cast<uint16_t*>(panel_space), *rounded = reinterpret_cast<uint16_t*>(a_space);
  const int64_t k = round_up(dc.cols, 2);
  round_rows(StoredMatrix<const float>(dc), rounded, k);
  const auto pack = [&](int64_t row, const float*, const MatrixView<float>& target,
                        const PanelPlace<uint16_t>& place) -> int64_t {
    with_stored_elements<float>(w.row_range(row, row + target.cols),
                                [&](const auto& rows) { pack_transposed_units(rows, place.data); });
    return 0;
  };
  // Of one that is not laid out they are whole rows, which the processor guesses.
  const auto lines_of = [&](int64_t row) { return panels.laid_out(row) ? panels.lines(row, kPanel<float>) : Lines(); };
  multiply_units({rounded, dc.rows, k, k}, panels, panel, pack, lines_of, nullptr, da, accumulate,
                 least_of<float>(Activation::kIdentity));
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

// panels: those of a B that stands in bfloat16.
inline void multiply_bfloat16(const Concatenated<float>& a, const StoredMatrix<const float>& b,
                              const Panels<float>& panels, const float* bias, const MatrixView<float>& c, float* panel,
                              float* a_space) {
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
    multiply<float>(rounded, MatrixView<const float>{packed, k, width, panel_width}, Panels<float>(), bias_panel,
                    c.columns(column, width), panel);
  }
}

#endif
