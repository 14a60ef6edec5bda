// Products of a few rows with a matrix: one register tile, three ways to feed it. Included once per capability.
//
// The tile is kRegisterTileRows rows by kVectors vectors. B comes from a packed panel (contiguous, zero-padded) or,
// where few rows would not pay for packing, from the matrix itself. Every element is one sum over k in ascending order,
// so a result depends on neither the tiling nor the number of threads.

#if SAML_VECTOR_BYTES == 64
constexpr int kRegisterTileRows = 12;
#elif SAML_VECTOR_BYTES == 32
constexpr int kRegisterTileRows = 6;
#else
constexpr int kRegisterTileRows = 4;
#endif
constexpr int kVectors = 2;
template <typename scalar_t>
constexpr int64_t kPanel = kVectors * kLanes<scalar_t>;

// Up to this many rows B is read in place: packing it would cost as much as using it.
constexpr int64_t kRowsWithoutPacking = 2 * kRegisterTileRows;

// From this many panels on B is then read in order, as memory delivers it fastest: by one row of A row by row, so many
// terms of a sum at a time; by several in chunks of so many of its rows, which stay in cache while all columns of C
// pass.
constexpr int64_t kPanelsToStream = 4;
constexpr int kStreamedTerms = 4;
constexpr int64_t kChunkTerms = 16;

// A factor: element (row, k) stands at data[row * row_stride + k * k_stride].
template <typename scalar_t>
struct Operand {
  const scalar_t* data;
  int64_t row_stride;
  int64_t k_stride;
  int64_t k;

  Operand from_row(int64_t row) const { return {data + row * row_stride, row_stride, k_stride, k}; }
};

template <typename scalar_t>
inline Operand<scalar_t> operand(const MatrixView<const scalar_t>& a) {
  return {a.data, a.ld, 1, a.cols};
}

// acc += A B over a.k terms.
template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void multiply_add(vec<scalar_t> (&acc)[rows][vectors], const Operand<scalar_t>& a,
                                                        const scalar_t* b, int64_t ldb) {
  const scalar_t* column = a.data;
  for (int64_t k = 0; k < a.k; ++k, column += a.k_stride, b += ldb) {
    vec<scalar_t> factor[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      factor[v] = load(b + v * kLanes<scalar_t>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const scalar_t value = column[r * a.row_stride];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        acc[r][v] += value * factor[v];
      }
    }
  }
}

// C (rows, vectors) = [bias or C or 0] + A1 B1 + A2 B2, B2 following B1.
template <int rows, int vectors, typename scalar_t>
void register_tile(const Operand<scalar_t>& a1, const Operand<scalar_t>& a2, const scalar_t* b, int64_t ldb,
                   const scalar_t* bias, scalar_t* c, int64_t ldc, bool accumulate) {
  vec<scalar_t> acc[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = accumulate        ? load(c + r * ldc + v * kLanes<scalar_t>)
                  : bias != nullptr ? load(bias + v * kLanes<scalar_t>)
                                    : vec<scalar_t>{};
    }
  }
  multiply_add<rows, vectors>(acc, a1, b, ldb);
  multiply_add<rows, vectors>(acc, a2, b + a1.k * ldb, ldb);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      store(c + r * ldc + v * kLanes<scalar_t>, acc[r][v]);
    }
  }
}

template <typename scalar_t>
using RegisterTile = void (*)(const Operand<scalar_t>&, const Operand<scalar_t>&, const scalar_t*, int64_t,
                              const scalar_t*, scalar_t*, int64_t, bool);

template <int vectors, typename scalar_t, int... rows>
constexpr std::array<RegisterTile<scalar_t>, sizeof...(rows)> register_tiles(std::integer_sequence<int, rows...>) {
  return {&register_tile<rows + 1, vectors, scalar_t>...};
}

// By number of rows, less one.
template <int vectors, typename scalar_t>
constexpr auto kRegisterTiles = register_tiles<vectors, scalar_t>(std::make_integer_sequence<int, kRegisterTileRows>{});

// C = [bias or C or 0] + A1 B1 + A2 B2 in one register tile, through a buffer where C is narrower; bias is not.
template <typename scalar_t>
inline void multiply_tile(const Operand<scalar_t>& a1, const Operand<scalar_t>& a2, const scalar_t* b, int64_t ldb,
                          const scalar_t* bias, Matrix<scalar_t> c, bool accumulate) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const auto tile = kRegisterTiles<kVectors, scalar_t>[c.rows - 1];
  if (c.cols == panel_width) {
    tile(a1, a2, b, ldb, bias, c.data, c.ld, accumulate);
    return;
  }
  alignas(64) scalar_t edge[kRegisterTileRows * panel_width];
  for (int64_t r = 0; accumulate && r < c.rows; ++r) {
    std::copy_n(c.row(r), c.cols, edge + r * panel_width);
    std::fill(edge + r * panel_width + c.cols, edge + (r + 1) * panel_width, scalar_t(0));
  }
  tile(a1, a2, b, ldb, bias, edge, panel_width, accumulate);
  for (int64_t r = 0; r < c.rows; ++r) {
    std::copy_n(edge + r * panel_width, c.cols, c.row(r));
  }
}

// Up to kPanel columns of B into a panel (k, kPanel), zero-padded.
template <typename element_t, typename scalar_t>
inline void pack_elements(const MatrixView<const element_t>& b, scalar_t* panel) {
  constexpr int lanes = kLanes<scalar_t>;
  if (b.cols == kPanel<scalar_t>) {
    for (int64_t i = 0; i < b.rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(panel + i * kPanel<scalar_t> + v * lanes, load_widened(b.row(i) + v * lanes));
      }
    }
    return;
  }
  for (int64_t i = 0; i < b.rows; ++i) {
    scalar_t* row = panel + i * kPanel<scalar_t>;
    widen_values(b.row(i), b.cols, row);
    std::fill(row + b.cols, row + kPanel<scalar_t>, scalar_t(0));
  }
}

template <typename scalar_t>
inline void pack_panel(ConstStored<scalar_t> b, scalar_t* panel) {
  with_elements<scalar_t>(b, [&](const auto& view) { pack_elements(view, panel); });
}

// Asks for columns begin .. end of a row, which is read soon.
template <typename scalar_t>
inline void prefetch_columns(const StoredMatrix<const scalar_t>& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t line = 64 / a.element_size();
  for (int64_t i = begin; i < end; i += line) {
    __builtin_prefetch(a.at(row, i));
  }
}

// All panels of B, one after the other.
template <typename scalar_t>
void pack_panels(ConstStored<scalar_t> b, scalar_t* panels) {
  for (int64_t column = 0; column < b.cols; column += kPanel<scalar_t>) {
    pack_panel(b.columns(column, std::min(kPanel<scalar_t>, b.cols - column)), panels + column * b.rows);
  }
}

// All panels of Bᵀ. So are the weights of experts laid out, which are no products.
template <typename element_t, typename scalar_t>
void pack_transposed_elements(const MatrixView<const element_t>& b, scalar_t* panels) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  for (int64_t row = 0; row < b.rows; row += panel_width) {
    const int64_t width = std::min(panel_width, b.rows - row);
    scalar_t* panel = panels + row * b.cols;
    for (int64_t i = 0; i < b.cols; ++i) {
      for (int64_t r = 0; r < width; ++r) {
        panel[i * panel_width + r] = widened(b.row(row + r)[i]);
      }
      std::fill(panel + i * panel_width + width, panel + (i + 1) * panel_width, scalar_t(0));
    }
  }
}

template <typename scalar_t>
void pack_transposed_panels(ConstStored<scalar_t> b, scalar_t* panels) {
  with_stored_elements<scalar_t>(b, [&](const auto& view) { pack_transposed_elements(view, panels); });
}

// Asks for a line of memory that is read once: only the smallest cache takes it.
template <typename element_t>
inline void prefetch_once(const element_t* line) {
  __builtin_prefetch(line, 0, 0);
}

// c += Σ a_i b_i over `terms` rows b_i of B, known to the compiler: one row of C, n elements. `ask`: as many rows
// follow, and are asked for so that they pass the larger caches by, and leave what others keep there.
template <int terms, typename scalar_t, typename pointer_t>
inline void add_terms(const scalar_t* a, pointer_t b, int64_t ldb, scalar_t* c, int64_t n, [[maybe_unused]] bool ask) {
  constexpr int lanes = kLanes<scalar_t>;
  scalar_t factor[terms];
#pragma GCC unroll 4
  for (int i = 0; i < terms; ++i) {
    factor[i] = a[i];
  }
  int64_t column = 0;
  for (; column + lanes <= n; column += lanes) {
    vec<scalar_t> sum = load(c + column);
    if constexpr (std::is_pointer_v<pointer_t>) {
      if (ask && column * sizeof(*b) % 64 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < terms; ++i) {
          prefetch_once(b + (terms + i) * ldb + column);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < terms; ++i) {
      sum += factor[i] * load_widened(b + i * ldb + column);
    }
    store(c + column, sum);
  }
  for (; column < n; ++column) {
    stay_scalar();
    for (int i = 0; i < terms; ++i) {
      c[column] += factor[i] * widened(b[i * ldb + column]);
    }
  }
}

// C += A B, B row by row.
template <typename scalar_t>
void add_streamed(ConstMatrix<scalar_t> a, ConstStored<scalar_t> b, Matrix<scalar_t> c) {
  with_elements<scalar_t>(b, [&](const auto& view) {
    for (int64_t r = 0; r < c.rows; ++r) {
      int64_t k = 0;
      for (; k + kStreamedTerms <= a.cols; k += kStreamedTerms) {
        const bool ask = b.passing && k + 2 * kStreamedTerms <= a.cols;
        add_terms<kStreamedTerms>(a.row(r) + k, view.row(k), view.ld, c.row(r), c.cols, ask);
      }
      for (; k < a.cols; ++k) {
        add_terms<1>(a.row(r) + k, view.row(k), view.ld, c.row(r), c.cols, false);
      }
    }
  });
}

// C += A B, B chunk by chunk; the next one is asked for meanwhile. panel holds as many terms of a panel.
template <typename scalar_t>
void add_chunks(ConstMatrix<scalar_t> a, ConstStored<scalar_t> b, Matrix<scalar_t> c, scalar_t* panel) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const Operand<scalar_t> nothing{a.data, 0, 0, 0};
  const int64_t whole = c.cols / panel_width * panel_width;
  const bool in_place = b.storage == Storage::kComputed;
  for (int64_t k = 0; k < a.cols; k += kChunkTerms) {
    const int64_t end = std::min(k + kChunkTerms, a.cols);
    const Operand<scalar_t> chunk = operand(a.columns(k, end - k));
    for (int64_t column = 0; column < whole; column += panel_width) {
      for (int64_t row = end; row < std::min(end + kChunkTerms, a.cols); ++row) {
        prefetch_columns<scalar_t>(b, row, column, column + panel_width);
      }
      if (!in_place) {
        pack_panel<scalar_t>(b.row_range(k, end).columns(column, panel_width), panel);
      }
      const scalar_t* source = in_place ? b.view().row(k) + column : panel;
      for (int64_t row = 0; row < c.rows; row += kRegisterTileRows) {
        const int64_t row_end = std::min(row + kRegisterTileRows, c.rows);
        multiply_tile<scalar_t>(chunk.from_row(row), nothing, source, in_place ? b.ld : panel_width, nullptr,
                                c.row_range(row, row_end).columns(column, panel_width), true);
      }
    }
  }
  add_streamed<scalar_t>(a, b.columns(whole, c.cols - whole), c.columns(whole, c.cols - whole));
}

// C = [C if accumulate, or bias, or 0] + [A1 ; A2] B. panels are those of B, or null, and then panel holds
// a.cols() * kPanel elements.
template <typename scalar_t>
void multiply(const Concatenated<scalar_t>& a, ConstStored<scalar_t> b, const scalar_t* panels, const scalar_t* bias,
              Matrix<scalar_t> c, scalar_t* panel, bool accumulate = false) {
  const int64_t k = a.cols();
  constexpr int64_t panel_width = kPanel<scalar_t>;
  if (panels == nullptr && c.rows <= kRowsWithoutPacking && c.cols >= kPanelsToStream * panel_width) {
    for (int64_t r = 0; !accumulate && r < c.rows; ++r) {
      if (bias != nullptr) {
        std::copy_n(bias, c.cols, c.row(r));
      } else {
        std::fill_n(c.row(r), c.cols, scalar_t(0));
      }
    }
    const auto add = [&](ConstMatrix<scalar_t> left, ConstStored<scalar_t> right) {
      if (c.rows == 1) {
        add_streamed<scalar_t>(left, right, c);
      } else {
        add_chunks<scalar_t>(left, right, c, panel);
      }
    };
    add(a.left, b.row_range(0, a.left.cols));
    add(a.right, b.row_range(a.left.cols, k));
    return;
  }
  const Operand<scalar_t> a1 = operand(a.left), a2 = operand(a.right);
  alignas(64) scalar_t edge_bias[panel_width] = {};
  for (int64_t column = 0; column < c.cols; column += panel_width) {
    const int64_t width = std::min(panel_width, c.cols - column);
    const bool whole = width == panel_width;
    // The register tile reads floats: elsewhere a panel is widened before.
    const bool packed = panels != nullptr || !whole || c.rows > kRowsWithoutPacking || b.storage != Storage::kComputed;
    if (packed && panels == nullptr) {
      pack_panel<scalar_t>(b.columns(column, width), panel);
    }
    const scalar_t* source = panels != nullptr ? panels + column * k : packed ? panel : b.view().data + column;
    const int64_t stride = packed ? panel_width : b.ld;
    const scalar_t* start = bias == nullptr ? nullptr : bias + column;
    if (start != nullptr && !whole) {
      std::copy_n(start, width, edge_bias);
      start = edge_bias;
    }
    for (int64_t row = 0; row < c.rows; row += kRegisterTileRows) {
      const int64_t end = std::min(row + kRegisterTileRows, c.rows);
      multiply_tile<scalar_t>(a1.from_row(row), a2.from_row(row), source, stride, start,
                              c.row_range(row, end).columns(column, width), accumulate);
    }
  }
}

// dA = [dA +] dC Wᵀ for W (k, n): computed as (W dCᵀ)ᵀ, so that W is read once, in order, and only the few rows of dC
// are transposed. A weight in 16 bits, or a product, is first made floats, as many rows at a time as the register tile
// reads. panel holds
// n * (round_up(rows, kPanel) + kRegisterTileRows) elements.
template <typename scalar_t>
void multiply_transposed(ConstMatrix<scalar_t> dc, ConstStored<scalar_t> w, Matrix<scalar_t> da, bool accumulate,
                         scalar_t* panel) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  constexpr int64_t lanes = kLanes<scalar_t>;
  const int64_t n = w.cols;
  for (int64_t row = 0; row < dc.rows; row += panel_width) {
    const int64_t width = std::min(panel_width, dc.rows - row);
    scalar_t* target = panel + row * n;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < width; ++r) {
        target[i * panel_width + r] = dc.row(row + r)[i];
      }
      std::fill(target + i * panel_width + width, target + (i + 1) * panel_width, scalar_t(0));
    }
  }
  alignas(64) scalar_t block[kRegisterTileRows * panel_width];
  scalar_t* widened_rows = panel + round_up(dc.rows, panel_width) * n;
  const bool in_place = w.storage == Storage::kComputed;
  const Operand<scalar_t> rows_of_w = in_place ? operand(w.view()) : Operand<scalar_t>{widened_rows, n, 1, n};
  const Operand<scalar_t> nothing{rows_of_w.data, 0, 0, 0};
  for (int64_t i = 0; i < w.rows; i += kRegisterTileRows) {
    const int64_t count = std::min<int64_t>(kRegisterTileRows, w.rows - i);
    for (int64_t r = 0; !in_place && r < count; ++r) {
      read_row(w, i + r, 0, n, widened_rows + r * n);
    }
    const Operand<scalar_t> a = rows_of_w.from_row(in_place ? i : 0);
    for (int64_t row = 0; row < dc.rows; row += panel_width) {
      const int64_t width = std::min(panel_width, dc.rows - row);
      const auto tile =
          width <= lanes ? kRegisterTiles<1, scalar_t>[count - 1] : kRegisterTiles<kVectors, scalar_t>[count - 1];
      tile(a, nothing, panel + row * n, panel_width, nullptr, block, panel_width, false);
      for (int64_t r = 0; r < width; ++r) {
        scalar_t* target = da.row(row + r) + i;
        for (int64_t j = 0; j < count; ++j) {
          target[j] = block[j * panel_width + r] + (accumulate ? target[j] : scalar_t(0));
        }
      }
    }
  }
}
