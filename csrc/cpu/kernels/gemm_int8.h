// The same products with both factors rounded to int8 and summed exactly. Included once per capability, after
// gemm_amx.h.
//
//     s_r = max_k |A_rk| / 127, s_n = max_k |B_kn| / 127, 1 where that is 0;  a = round(A / s_r), b = round(B / s_n)
//     C_rn = bias_n + s_r s_n Σ_k a_rk b_kn
//
// As many consecutive k as fill 32 bits stand together in every lane. The dot-product instruction multiplies four
// unsigned bytes by four signed ones: it reads a + 128 for a, and 128 Σ_k b_kn, which stands with the panels, is taken
// off the sum. The tile unit reads the same factors: a row's lanes are a row of a left tile, a panel's lanes those of a
// right one. Without either pairs of 16 bits are multiplied: pairs of bytes would overflow their 16-bit sums, and what
// keeps them from it costs more than twice the memory.

typedef int32_t Int32Lanes __attribute__((vector_size(SAML_VECTOR_BYTES)));

#if !SAML_HAS_TILES
#if SAML_VECTOR_BYTES == 64
using Lanes = __m512i;
inline Lanes load_lanes(const void* p) { return _mm512_loadu_si512(p); }
inline Lanes in_all_lanes(int32_t terms) { return _mm512_set1_epi32(terms); }
#elif SAML_VECTOR_BYTES == 32
using Lanes = __m256i;
inline Lanes load_lanes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Lanes in_all_lanes(int32_t terms) { return _mm256_set1_epi32(terms); }
#else
using Lanes = Int32Lanes;
inline Lanes load_lanes(const void* p) {
  Lanes lanes;
  std::memcpy(&lanes, p, sizeof(lanes));
  return lanes;
}
inline Lanes in_all_lanes(int32_t terms) { return terms - Lanes{}; }
#endif
#endif

#if SAML_HAS_TILES
using Int8Factor = int8_t;
#elif SAML_HAS_INT8_DOT
using Int8Factor = int8_t;
#if SAML_VECTOR_BYTES == 64
inline Int32Lanes add_products(Int32Lanes sum, Lanes a, Lanes b) {
  return (Int32Lanes)_mm512_dpbusd_epi32((Lanes)sum, a, b);
}
#else
inline Int32Lanes add_products(Int32Lanes sum, Lanes a, Lanes b) {
  return (Int32Lanes)_mm256_dpbusd_avx_epi32((Lanes)sum, a, b);
}
#endif
#elif SAML_VECTOR_BYTES == 64
using Int8Factor = int16_t;
inline Int32Lanes add_products(Int32Lanes sum, Lanes a, Lanes b) { return sum + (Int32Lanes)_mm512_madd_epi16(a, b); }
#elif SAML_VECTOR_BYTES == 32
using Int8Factor = int16_t;
inline Int32Lanes add_products(Int32Lanes sum, Lanes a, Lanes b) { return sum + (Int32Lanes)_mm256_madd_epi16(a, b); }
#else
using Int8Factor = int8_t;
// As the dot-product instruction does it.
inline Int32Lanes add_products(Int32Lanes sum, Lanes a, Lanes b) {
  for (int shift = 0; shift < 32; shift += 8) {
    sum += ((a >> shift) & 0xff) * ((b << (24 - shift)) >> 24);
  }
  return sum;
}
#endif

constexpr int kInt8Rows = SAML_HAS_TILES ? kBlockSide : kRegisterTileRows;
constexpr int kFactorBits = 8 * sizeof(Int8Factor);
constexpr int64_t kTermsOfLane = sizeof(int32_t) / sizeof(Int8Factor);
constexpr int32_t kInt8Offset = kTermsOfLane == 4 ? 128 : 0;

// Tiles are read whole: so many lanes of terms, and so many rows after the last.
constexpr int64_t kLanesAtOnce = SAML_HAS_TILES != 0 ? kTileSide : 1;
constexpr int64_t kRowsToSpare = SAML_HAS_TILES != 0 ? kTileSide - 1 : 0;

// Lanes of terms that a sum over k takes.
inline int64_t lanes_of(int64_t k) { return round_up((k + kTermsOfLane - 1) / kTermsOfLane, kLanesAtOnce); }

// Lanes that quantise_rows and multiply_int8 touch of so many rows.
inline int64_t int8_rows_size(int64_t rows, int64_t k) { return (rows + kRowsToSpare) * lanes_of(k); }

// The panels of one matrix, its columns' scales and what to take off their sums, one after the other.
struct Int8Panels {
  int32_t* terms;
  float* scales;
  int32_t* excess;

  Int8Panels(int8_t* block, int64_t k, int64_t n)
      : terms(reinterpret_cast<int32_t*>(block)),
        scales(reinterpret_cast<float*>(terms + lanes_of(k) * round_up(n, kPanel<float>))),
        excess(reinterpret_cast<int32_t*>(scales + round_up(n, kPanel<float>))) {}
};

template <typename scalar_t>
int64_t int8_panels_size(const Weights<scalar_t>& weights) {
  return (lanes_of(weights.k()) + 2) * round_up(weights.n, kPanel<float>) * 4;
}

// Bits of |x|. As integers they are in order of magnitude, NaN above all.
inline int32_t magnitude_bits(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }

inline float int8_scale(float largest) { return largest == 0 ? 1.0f : largest / 127.0f; }

// Of a NaN, or of infinities, the scale makes the result NaN: what stands here may be any int8.
inline int32_t round_to_int8(float x, float scale) {
  float quotient = x / scale;
  quotient = quotient > 127.0f ? 127.0f : quotient;
  quotient = quotient < -127.0f ? -127.0f : quotient;
  quotient = quotient == quotient ? quotient : 0.0f;
  // The integer stands in the low mantissa bits of the sum, rounded to even.
  return static_cast<int32_t>(bits_of(quotient + 12582912.0f)) - 0x4b400000;
}

inline Int32Lanes round_to_int8(vec<float> x, vec<float> scale) {
  const vec<float> nothing = {}, most = nothing + 127.0f;
  vec<float> quotient = x / scale;
  quotient = quotient > most ? most : quotient;
  quotient = quotient < -most ? -most : quotient;
  quotient = quotient == quotient ? quotient : nothing;
  return (Int32Lanes)(quotient + 12582912.0f) - 0x4b400000;
}

// Rows of [A1 ; A2] rounded to int8, lanes_of(k) lanes apart, and their scales.
inline void quantise_rows(const Concatenated<float>& a, Range rows, int32_t* target, float* scales) {
  const int64_t lanes = lanes_of(a.cols());
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const MatrixView<const float> parts[] = {a.left, a.right};
    int32_t largest = 0;
    for (const MatrixView<const float>& part : parts) {
      const float* x = part.row(r);
      for (int64_t i = 0; i < part.cols; ++i) {
        largest = std::max(largest, magnitude_bits(x[i]));
      }
    }
    const float scale = scales[r] = int8_scale(float_of(static_cast<uint32_t>(largest)));
    Int8Factor* factor = reinterpret_cast<Int8Factor*>(target + r * lanes);
    for (const MatrixView<const float>& part : parts) {
      const float* x = part.row(r);
      for (int64_t i = 0; i < part.cols; ++i) {
        // Of a byte the bit is 128: flipped, a reads as a + 128 without its sign.
        factor[i] = static_cast<Int8Factor>(round_to_int8(x[i], scale) ^ kInt8Offset);
      }
      factor += part.cols;
    }
    std::fill(factor, reinterpret_cast<Int8Factor*>(target + (r + 1) * lanes), Int8Factor(0));
  }
}

// All panels of B, however it is stored.
template <typename element_t>
void pack_int8_panels(const MatrixView<const element_t>& b, const Int8Panels& panels) {
  constexpr int64_t panel_width = kPanel<float>;
  constexpr int32_t mask = (1 << kFactorBits) - 1;
  const int64_t padded = round_up(b.cols, panel_width), lanes = lanes_of(b.rows);
  // Until the scales are known the columns' magnitudes stand in the place of what is to take off.
  std::fill_n(panels.excess, padded, 0);
  for (int64_t i = 0; i < b.rows; ++i) {
    const auto row = b.row(i);
    for (int64_t n = 0; n < b.cols; ++n) {
      panels.excess[n] = std::max(panels.excess[n], magnitude_bits(widened(row[n])));
    }
  }
  for (int64_t n = 0; n < padded; ++n) {
    panels.scales[n] = int8_scale(float_of(static_cast<uint32_t>(panels.excess[n])));
  }
  std::fill_n(panels.excess, padded, 0);
  // In the order of the rows, which is that of memory.
  constexpr int lanes_of_vector = kLanes<float>;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t begin = lane * kTermsOfLane, count = std::min(kTermsOfLane, b.rows - begin);
    for (int64_t n = 0; n < padded; n += lanes_of_vector) {
      const vec<float> scale = load(panels.scales + n);
      Int32Lanes terms = {}, sums;
      std::memcpy(&sums, panels.excess + n, sizeof(sums));
      for (int64_t j = 0; j < count; ++j) {
        const auto row = b.row(begin + j) + n;
        alignas(64) float edge[lanes_of_vector] = {};
        if (n + lanes_of_vector > b.cols) {
          widen_values(row, std::max<int64_t>(b.cols - n, 0), edge);
        }
        const Int32Lanes value = round_to_int8(n + lanes_of_vector > b.cols ? load(edge) : load_widened(row), scale);
        terms |= (value & mask) << static_cast<int>(kFactorBits * j);
        sums += value;
      }
      const int64_t column = n / panel_width * panel_width;
      int32_t* packed = panels.terms + column * lanes + lane * panel_width + (n - column);
      store_for_others(reinterpret_cast<float*>(packed), (vec<float>)terms);
      std::memcpy(panels.excess + n, &sums, sizeof(sums));
    }
  }
  for (int64_t n = 0; n < padded; ++n) {
    panels.excess[n] *= kInt8Offset;
  }
  finish_stores_for_others();
}

// What a sum of products stands for, or `least` where that is more.
inline vec<float> restored(Int32Lanes sum, float row_scale, const float* scales, const int32_t* excess,
                           const float* bias, float least) {
  Int32Lanes off;
  std::memcpy(&off, excess, sizeof(off));
  return at_least(__builtin_convertvector(sum - off, vec<float>) * row_scale * load(scales) + load(bias), least);
}

// C (rows, kPanel) of quantised rows and one packed panel with its scales, excess and bias.
#if SAML_HAS_TILES

// 16 row_tiles by 32 sums.
template <int row_tiles>
inline void add_tiles_int8(const int32_t* a, int64_t terms, const int32_t* panel, int32_t* sums) {
  constexpr int64_t panel_width = kPanel<float>, panel_bytes = panel_width * static_cast<int64_t>(sizeof(int32_t));
  static_assert(panel_width == kBlockSide);
  const int64_t row_bytes = terms * static_cast<int64_t>(sizeof(int32_t));
  // The tile intrinsics do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (row_tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < terms; i += kTileSide) {
    _tile_loadd(4, a + i, row_bytes);
    _tile_loadd(6, panel + i * panel_width, panel_bytes);
    _tile_loadd(7, panel + i * panel_width + kTileSide, panel_bytes);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if constexpr (row_tiles == 2) {
      _tile_loadd(5, a + kTileSide * terms + i, row_bytes);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, panel_bytes);
  _tile_stored(1, sums + kTileSide, panel_bytes);
  if constexpr (row_tiles == 2) {
    _tile_stored(2, sums + kTileSide * panel_width, panel_bytes);
    _tile_stored(3, sums + kTileSide * panel_width + kTileSide, panel_bytes);
  }
  asm volatile("" ::: "memory");
}

inline void block_int8(int64_t rows, const int32_t* a, const float* row_scales, int64_t terms, const int32_t* panel,
                       const float* scales, const int32_t* excess, const float* bias, float* c, int64_t ldc,
                       float least, Ahead) {
  constexpr int64_t panel_width = kPanel<float>;
  alignas(64) int32_t sums[kInt8Rows * panel_width];
  (rows > kTileSide ? &add_tiles_int8<2> : &add_tiles_int8<1>)(a, terms, panel, sums);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < panel_width; n += kLanes<float>) {
      Int32Lanes sum;
      std::memcpy(&sum, sums + r * panel_width + n, sizeof(sum));
      store(c + r * ldc + n, restored(sum, row_scales[r], scales + n, excess + n, bias + n, least));
    }
  }
}

#else

// sums += a b, a column of A, whose rows are so far apart, times a row of B.
template <int rows, int vectors>
inline __attribute__((always_inline)) void add_lane(Int32Lanes (&sums)[rows][vectors], const int32_t* a, int64_t lda,
                                                    const int32_t* panel) {
  Lanes b[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    b[v] = load_lanes(panel + v * kLanes<float>);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const Lanes value = in_all_lanes(a[r * lda]);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = add_products(sums[r][v], value, b[v]);
    }
  }
}

// A tile of fewer rows asks for nothing, as it would take more code than time; nor where a product and its sum are two
// instructions, of which the compiler would begin so many products that it runs out of registers.
template <int rows, int vectors>
inline __attribute__((always_inline)) void add_all_products(Int32Lanes (&sums)[rows][vectors], const int32_t* a,
                                                            int64_t terms, const int32_t* panel, Ahead& ahead) {
  int64_t i = 0;
  for (; SAML_HAS_INT8_DOT && rows == kRegisterTileRows && i + kTermsAtOnce <= terms; i += kTermsAtOnce) {
    ahead.ask();
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTermsAtOnce; ++j, panel += kPanel<float>) {
      add_lane(sums, a + i + j, terms, panel);
    }
  }
  for (; i < terms; ++i, panel += kPanel<float>) {
    add_lane(sums, a + i, terms, panel);
  }
}

template <int rows>
void register_tile_int8(const int32_t* a, const float* row_scales, int64_t terms, const int32_t* panel,
                        const float* scales, const int32_t* excess, const float* bias, float* c, int64_t ldc,
                        float least, Ahead ahead) {
  Int32Lanes sums[rows][kVectors];
  ask_for_sums<rows, kPanel<float> >(c, ldc);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Int32Lanes{};
    }
  }
  add_all_products<rows, kVectors>(sums, a, terms, panel, ahead);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int n = v * kLanes<float>;
      store(c + r * ldc + n, restored(sums[r][v], row_scales[r], scales + n, excess + n, bias + n, least));
    }
  }
}

using RegisterTileInt8 = void (*)(const int32_t*, const float*, int64_t, const int32_t*, const float*, const int32_t*,
                                  const float*, float*, int64_t, float, Ahead);

template <int... rows>
constexpr std::array<RegisterTileInt8, sizeof...(rows)> register_tiles_int8(std::integer_sequence<int, rows...>) {
  return {&register_tile_int8<rows + 1>...};
}

constexpr auto kRegisterTilesInt8 = register_tiles_int8(std::make_integer_sequence<int, kInt8Rows>{});

inline void block_int8(int64_t rows, const int32_t* a, const float* row_scales, int64_t terms, const int32_t* panel,
                       const float* scales, const int32_t* excess, const float* bias, float* c, int64_t ldc,
                       float least, Ahead ahead) {
  kRegisterTilesInt8[rows - 1](a, row_scales, terms, panel, scales, excess, bias, c, ldc, least, ahead);
}

#endif

// C = max(least, bias + s s A B) of rows that quantise_rows has written.
inline void multiply_int8(const int32_t* a, const float* row_scales, int64_t k, const Int8Panels& panels,
                          const float* bias, const MatrixView<float>& c, float least) {
  constexpr int64_t panel_width = kPanel<float>;
  const int64_t terms = lanes_of(k);
  alignas(64) float edge[kInt8Rows * panel_width];
  alignas(64) float edge_bias[panel_width] = {};
  for (int64_t column = 0; column < c.cols; column += panel_width) {
    const int64_t width = std::min(panel_width, c.cols - column);
    const bool whole = width == panel_width;
    const int32_t* panel = panels.terms + column * terms;
    const int64_t lines = terms * panel_width * static_cast<int64_t>(sizeof(int32_t)) / 64;
    Lines next = column + width < c.cols ? Lines({panel + terms * panel_width, 64, lines}) : Lines().or_none(panel);
    std::copy_n(bias + column, width, edge_bias);
    for (int64_t row = 0; row < c.rows; row += kInt8Rows) {
      const int64_t count = std::min<int64_t>(kInt8Rows, c.rows - row);
      float* target = c.row(row) + column;
      block_int8(count, a + row * terms, row_scales + row, terms, panel, panels.scales + column, panels.excess + column,
                 edge_bias, whole ? target : edge, whole ? c.ld : panel_width, least, next.next(terms));
      for (int64_t r = 0; !whole && r < count; ++r) {
        std::copy_n(edge + r * panel_width, width, target + r * c.ld);
      }
    }
  }
}
