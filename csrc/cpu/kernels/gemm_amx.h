// Products on AMX, whose tile unit multiplies bfloat16 factors and sums in float32. Included once per capability, after
// gemm_bfloat16.h.
//
// A float factor is the sum of three bfloat16 parts, x = x1 + x2 + x3, each the rounding of what the ones before it
// leave: 24 bits in all, as many as a float has. A product keeps the six pairs whose parts' indices sum to at most 4;
// the other three are below 2^-24 of it, as the rounding of a float product is. x1 alone is x rounded to bfloat16, so a
// bfloat16 product reads the same parts. What is not finite comes out not finite, though an infinity may become NaN;
// parts below 1e-38 count as 0.

constexpr int64_t kFloatParts = 3;

// A product's register block: two by two tiles of sums, the other four hold its factors.
constexpr int64_t kBlockSide = 2 * kTileSide;

inline int64_t tiles_of(int64_t count, int64_t side) { return (count + side - 1) / side; }

// Elements of a factor of `side` rows (or columns) by k, in tiles.
inline int64_t tiles_size(int64_t side, int64_t k, int64_t parts) {
  return tiles_of(side, kTileSide) * tiles_of(k, kTileDepth) * parts * kTileElements;
}

// Factors in tiles, and how far apart their sides' tiles stand.
struct TileFactors {
  const uint16_t* left;
  const uint16_t* right;
  int64_t depth;  // tiles of k
  int64_t parts;  // laid out, of which a product may read fewer

  int64_t side_stride() const { return depth * parts * kTileElements; }
};

enum class Sums { kFromBias, kAccumulate };

#if SAML_HAS_TILES

// Sets up the thread's tile registers, and gives them back: a thread that holds them is slower to switch.
class TileRegisters {
 public:
  TileRegisters() { set_up(); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  static void set_up() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = kTileSide;
    }
    _tile_loadconfig(&shape);
  }
};

template <typename element_t>
inline const element_t* address(const element_t* p) {
  return p;
}

template <typename scalar_t>
inline const scalar_t* address(ProductPointer<scalar_t> p) {
  return p.own;
}

// What will be read soon: a column block of 128 rows touches as many pages, which the processor does not foresee.
template <typename element_t>
inline void prefetch(const Concatenated<element_t>& source, int64_t row, int64_t column) {
  const auto& [left, right] = source;
  if (column >= source.cols()) {
    return;
  }
  const auto place = column < left.cols ? left.row(row) + column : right.row(row) + (column - left.cols);
  _mm_prefetch(reinterpret_cast<const char*>(address(place)), _MM_HINT_T0);
}

// Layout of a factor: by 16 rows (left factor) or columns (right factor), then by 32 of k, then by part.

// Rows of a left factor; a tile's other rows are left as they are.
inline void lay_out_left(const Concatenated<float>& source, Range rows, int64_t parts, uint16_t* tiles) {
  const int64_t depth = tiles_of(source.cols(), kTileDepth);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint16_t* target = tiles + row / kTileSide * depth * parts * kTileElements + row % kTileSide * kTileDepth;
    for (int64_t k = 0; k < depth; ++k) {
      store_row_units(source, row, k * kTileDepth, parts, target + k * parts * kTileElements);
    }
  }
}

// Columns begin .. begin + count as a right factor, or their transpose as a left one; k runs over the source's rows.
// Row by row, so that the source is read in order.
template <bool transposed, typename element_t>
inline void lay_out_columns(const Concatenated<element_t>& source, int64_t begin, int64_t count, int64_t parts,
                            uint16_t* tiles) {
  const int64_t depth = tiles_of(source.rows(), kTileDepth), step = parts * kTileElements;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t side = 0; side < tiles_of(count, kTileSide); ++side) {
      uint16_t* target = tiles + (side * depth + k) * step;
      for (int64_t r = 0; r < kTileSide; ++r) {
        const int64_t row = k * kTileDepth + 2 * r, column = begin + side * kTileSide;
        prefetch(source, row, column + kBlockSide);
        prefetch(source, row + 1, column + kBlockSide);
        store_pair_units(source, row, column, parts, target + r * kTileDepth);
      }
      for (int64_t part = 0; transposed && part < parts; ++part) {
        transpose_units(target + part * kTileElements, kTileDepth);
      }
    }
  }
}

// The transpose of the whole source as a right factor, k running over its columns.
template <typename element_t>
inline void lay_out_right_transposed(const Concatenated<element_t>& source, int64_t parts, uint16_t* tiles) {
  const int64_t depth = tiles_of(source.cols(), kTileDepth);
  for (int64_t side = 0; side < tiles_of(source.rows(), kTileSide); ++side) {
    for (int64_t k = 0; k < depth; ++k, tiles += parts * kTileElements) {
      for (int64_t r = 0; r < kTileSide; ++r) {
        store_row_units(source, side * kTileSide + r, k * kTileDepth, parts, tiles + r * kTileDepth);
      }
      for (int64_t part = 0; part < parts; ++part) {
        transpose_units(tiles + part * kTileElements, kTileDepth);
      }
    }
  }
}

// A block of row_tiles by column_tiles tiles: C = [bias in every row, or C] + left · right with that many parts.
template <int parts, int row_tiles, int column_tiles>
void tile_block(const TileFactors& factors, const uint16_t* left, const uint16_t* right, Sums sums, const float* bias,
                float* c, int64_t ldc) {
  // The tile intrinsics do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  const int64_t c_bytes = ldc * static_cast<int64_t>(sizeof(float));
  // A row stride of 0 puts the bias into every row.
  const bool from_bias = sums == Sums::kFromBias;
  const float* start = from_bias ? bias : c;
  const int64_t start_bytes = from_bias ? 0 : c_bytes, start_ld = from_bias ? 0 : ldc;
  _tile_loadd(0, start, start_bytes);
  if constexpr (column_tiles == 2) _tile_loadd(1, start + kTileSide, start_bytes);
  if constexpr (row_tiles == 2) _tile_loadd(2, start + kTileSide * start_ld, start_bytes);
  if constexpr (row_tiles == 2 && column_tiles == 2) {
    _tile_loadd(3, start + kTileSide * start_ld + kTileSide, start_bytes);
  }
  const int64_t stride = factors.side_stride(), step = factors.parts * kTileElements;
  const auto load_left = [&](int64_t part) __attribute__((always_inline)) {
    _tile_loadd(4, left + part * kTileElements, 64);
    if constexpr (row_tiles == 2) _tile_loadd(5, left + stride + part * kTileElements, 64);
  };
  const auto load_right = [&](int64_t part) __attribute__((always_inline)) {
    _tile_loadd(6, right + part * kTileElements, 64);
    if constexpr (column_tiles == 2) _tile_loadd(7, right + stride + part * kTileElements, 64);
  };
  const auto multiply_add = []() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (column_tiles == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (row_tiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (row_tiles == 2 && column_tiles == 2) _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t k = 0; k < factors.depth; ++k, left += step, right += step) {
    load_left(0);
    load_right(0);
    multiply_add();
    if constexpr (parts == kFloatParts) {
      load_right(1);
      multiply_add();
      load_right(2);
      multiply_add();
      load_left(1);
      load_right(1);
      multiply_add();
      load_right(0);
      multiply_add();
      load_left(2);
      multiply_add();
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (column_tiles == 2) _tile_stored(1, c + kTileSide, c_bytes);
  if constexpr (row_tiles == 2) _tile_stored(2, c + kTileSide * ldc, c_bytes);
  if constexpr (row_tiles == 2 && column_tiles == 2) _tile_stored(3, c + kTileSide * ldc + kTileSide, c_bytes);
  asm volatile("" ::: "memory");
}

using TileBlock = void (*)(const TileFactors&, const uint16_t*, const uint16_t*, Sums, const float*, float*, int64_t);

// By tiles of rows and of columns, less one.
template <int parts>
constexpr TileBlock kTileBlocks[2][2] = {{&tile_block<parts, 1, 1>, &tile_block<parts, 1, 2>},
                                         {&tile_block<parts, 2, 1>, &tile_block<parts, 2, 2>}};

// These rows of C = [bias, or 0, or C] + left · right. bias has a value for every column or is null.
inline void multiply_tiles(const TileFactors& factors, int64_t parts, Range rows, Sums sums, const float* bias,
                           const MatrixView<float>& c) {
  const auto& blocks = parts == 1 ? kTileBlocks<1> : kTileBlocks<kFloatParts>;
  alignas(64) float edge[kBlockSide * kBlockSide];
  alignas(64) float block_bias[kBlockSide] = {};
  for (int64_t column = 0; column < c.cols; column += kBlockSide) {
    const int64_t width = std::min(kBlockSide, c.cols - column), column_tiles = tiles_of(width, kTileSide);
    if (bias != nullptr) {
      std::copy_n(bias + column, width, block_bias);
    }
    const uint16_t* right = factors.right + column / kTileSide * factors.side_stride();
    for (int64_t row = rows.begin / kTileSide * kTileSide; row < rows.end; row += kBlockSide) {
      const int64_t height = std::min(kBlockSide, rows.end - row), row_tiles = tiles_of(height, kTileSide);
      const TileBlock block = blocks[row_tiles - 1][column_tiles - 1];
      const uint16_t* left = factors.left + row / kTileSide * factors.side_stride();
      float* target = c.row(row) + column;
      if (row >= rows.begin && height == row_tiles * kTileSide && width == column_tiles * kTileSide) {
        block(factors, left, right, sums, block_bias, target, c.ld);
        continue;
      }
      const int64_t begin = std::max<int64_t>(rows.begin - row, 0);
      if (sums == Sums::kAccumulate) {
        std::fill_n(edge, kBlockSide * kBlockSide, 0.0f);
        for (int64_t r = begin; r < height; ++r) {
          std::copy_n(target + r * c.ld, width, edge + r * kBlockSide);
        }
      }
      block(factors, left, right, sums, block_bias, edge, kBlockSide);
      for (int64_t r = begin; r < height; ++r) {
        std::copy_n(edge + r * kBlockSide, width, target + r * c.ld);
      }
    }
  }
}

#else

struct TileRegisters {
  static void set_up() {}
};

#endif
