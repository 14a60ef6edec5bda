// Products of a few rows with a matrix. Included once per capability.
//
// A register tile is kRegisterTileRows rows by kVectors vectors; B comes from a packed panel (contiguous, zero-padded)
// or from the matrix itself. Where few rows would not pay for packing, B is read in order instead. Every element is one
// sum over k in ascending order, so a result depends on neither the way, nor the tiling, nor the number of threads.

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

// Up to kRowsWithoutPacking rows of A read a B of so many panels or more in order, as memory delivers it fastest: row
// by row, so many terms of a sum at a time, which meet up to so many rows of A while they are in registers. Rows so far
// below are asked for meanwhile.
constexpr int64_t kPanelsToStream = 4;
constexpr int kStreamedTerms = 4;
constexpr int kStreamedRows = 4;
constexpr int64_t kStreamedAhead = 8;

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

// Asks for the rows of C that a whole tile is going to be stored in. Streams are more than the second-level cache
// holds, and a store waits for its line.
template <int rows, int64_t width, typename element_t>
inline __attribute__((always_inline)) void ask_for_sums(const element_t* c, int64_t ldc) {
  if constexpr (rows < kRegisterTileRows) {
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < width; line += 64 / sizeof(element_t)) {
      __builtin_prefetch(c + r * ldc + line, 1);
    }
  }
}

// acc += a b, a column of A times a row of B.
template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void add_term(vec<scalar_t> (&acc)[rows][vectors], const scalar_t* column,
                                                    int64_t row_stride, const vec<scalar_t> (&factor)[vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const scalar_t value = column[r * row_stride];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] += value * factor[v];
    }
  }
}

template <int vectors, typename scalar_t>
inline __attribute__((always_inline)) void load_row(vec<scalar_t> (&row)[vectors], const scalar_t* b) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    row[v] = load(b + v * kLanes<scalar_t>);
  }
}

template <int vectors, typename scalar_t>
inline __attribute__((always_inline)) void store_row(const vec<scalar_t> (&row)[vectors], scalar_t* c) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    store(c + v * kLanes<scalar_t>, row[v]);
  }
}

// acc = C or bias or 0.
template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void begin_sums(vec<scalar_t> (&acc)[rows][vectors], const scalar_t* bias,
                                                      const scalar_t* c, int64_t ldc, bool accumulate) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = accumulate        ? load(c + r * ldc + v * kLanes<scalar_t>)
                  : bias != nullptr ? load(bias + v * kLanes<scalar_t>)
                                    : vec<scalar_t>{};
    }
  }
}

template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void end_sums(const vec<scalar_t> (&acc)[rows][vectors], scalar_t* c,
                                                    int64_t ldc) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    store_row(acc[r], c + r * ldc);
  }
}

// `least` where that is more; NaN stays.
template <typename vector_t, typename scalar_t>
inline vector_t at_least(vector_t x, scalar_t least) {
  const vector_t least_of_all = least - vector_t{};
  return x <= least_of_all ? least_of_all : x;
}

template <int rows, int vectors, typename vector_t, typename scalar_t>
inline __attribute__((always_inline)) void clamp_sums(vector_t (&acc)[rows][vectors], scalar_t least) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = at_least(acc[r][v], least);
    }
  }
}

// acc += A B over a.k terms.
template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void multiply_add(vec<scalar_t> (&acc)[rows][vectors], const Operand<scalar_t>& a,
                                                        const scalar_t* b, int64_t ldb, Ahead& ahead) {
  const scalar_t* column = a.data;
  int64_t k = 0;
  for (; k + kTermsAtOnce <= a.k; k += kTermsAtOnce) {
    ahead.ask();
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTermsAtOnce; ++i, column += a.k_stride, b += ldb) {
      vec<scalar_t> factor[vectors];
      load_row(factor, b);
      add_term(acc, column, a.row_stride, factor);
    }
  }
  for (; k < a.k; ++k, column += a.k_stride, b += ldb) {
    vec<scalar_t> factor[vectors];
    load_row(factor, b);
    add_term(acc, column, a.row_stride, factor);
  }
}

// C (rows, vectors) = max(least, [bias or C or 0] + A1 B1 + A2 B2), B2 following B1.
template <int rows, int vectors, typename scalar_t>
void register_tile(const Operand<scalar_t>& a1, const Operand<scalar_t>& a2, const scalar_t* b, int64_t ldb,
                   const scalar_t* bias, scalar_t* c, int64_t ldc, bool accumulate, scalar_t least, Ahead ahead) {
  vec<scalar_t> acc[rows][vectors];
  ask_for_sums<rows, vectors * kLanes<scalar_t>>(c, ldc);
  begin_sums(acc, bias, c, ldc, accumulate);
  multiply_add<rows, vectors>(acc, a1, b, ldb, ahead);
  multiply_add<rows, vectors>(acc, a2, b + a1.k * ldb, ldb, ahead);
  clamp_sums(acc, least);
  end_sums(acc, c, ldc);
}

// As multiply_add, and B into its panel. The rows so far below are asked for, up to `last`.
template <int rows, int vectors, typename scalar_t>
inline __attribute__((always_inline)) void multiply_add_packing(vec<scalar_t> (&acc)[rows][vectors],
                                                                const Operand<scalar_t>& a, const scalar_t* b,
                                                                int64_t ldb, const scalar_t* last, scalar_t* panel,
                                                                scalar_t* shared) {
  constexpr int64_t width = vectors * kLanes<scalar_t>, ahead = 16;
  const scalar_t* column = a.data;
  for (int64_t k = 0; k < a.k; ++k, column += a.k_stride, b += ldb, panel += width) {
    const scalar_t* below = last - b > ahead * ldb ? b + ahead * ldb : last;
#pragma GCC unroll 2
    for (int64_t i = 0; i < width; i += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(below + i);
    }
    vec<scalar_t> factor[vectors];
    load_row(factor, b);
    store_row(factor, panel);
    if (shared != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        store_for_others(shared + v * kLanes<scalar_t>, factor[v]);
      }
      shared += width;
    }
    add_term(acc, column, a.row_stride, factor);
  }
}

// As register_tile, of whole tiles of rows and a panel of B that stands in rows: it is laid out on the way.
template <typename scalar_t>
void packing_tile(const Operand<scalar_t>& a1, const Operand<scalar_t>& a2, const scalar_t* b, int64_t ldb,
                  const scalar_t* bias, scalar_t* c, int64_t ldc, bool accumulate, scalar_t least, scalar_t* panel,
                  scalar_t* shared) {
  vec<scalar_t> acc[kRegisterTileRows][kVectors];
  ask_for_sums<kRegisterTileRows, kPanel<scalar_t>>(c, ldc);
  begin_sums(acc, bias, c, ldc, accumulate);
  const scalar_t* last = b + std::max<int64_t>(a1.k + a2.k - 1, 0) * ldb;
  const int64_t size = a1.k * kPanel<scalar_t>;
  multiply_add_packing(acc, a1, b, ldb, last, panel, shared);
  multiply_add_packing(acc, a2, b + a1.k * ldb, ldb, last, panel + size, shared == nullptr ? nullptr : shared + size);
  clamp_sums(acc, least);
  end_sums(acc, c, ldc);
}

template <typename scalar_t>
using RegisterTile = void (*)(const Operand<scalar_t>&, const Operand<scalar_t>&, const scalar_t*, int64_t,
                              const scalar_t*, scalar_t*, int64_t, bool, scalar_t, Ahead);

template <int vectors, typename scalar_t, int... rows>
constexpr std::array<RegisterTile<scalar_t>, sizeof...(rows)> register_tiles(std::integer_sequence<int, rows...>) {
  return {&register_tile<rows + 1, vectors, scalar_t>...};
}

// By number of rows, less one.
template <int vectors, typename scalar_t>
constexpr auto kRegisterTiles = register_tiles<vectors, scalar_t>(std::make_integer_sequence<int, kRegisterTileRows>{});

// C = max(least, [bias or C or 0] + A1 B1 + A2 B2) in one register tile, through a buffer where C is narrower; bias is
// not.
template <typename scalar_t>
inline void multiply_tile(const Operand<scalar_t>& a1, const Operand<scalar_t>& a2, const scalar_t* b, int64_t ldb,
                          const scalar_t* bias, Matrix<scalar_t> c, bool accumulate, scalar_t least, Ahead ahead) {
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const auto tile = kRegisterTiles<kVectors, scalar_t>[c.rows - 1];
  if (c.cols == panel_width) {
    tile(a1, a2, b, ldb, bias, c.data, c.ld, accumulate, least, ahead);
    return;
  }
  alignas(64) scalar_t edge[kRegisterTileRows * panel_width];
  for (int64_t r = 0; accumulate && r < c.rows; ++r) {
    std::copy_n(c.row(r), c.cols, edge + r * panel_width);
    std::fill(edge + r * panel_width + c.cols, edge + (r + 1) * panel_width, scalar_t(0));
  }
  tile(a1, a2, b, ldb, bias, edge, panel_width, accumulate, least, ahead);
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

// C += A B over kStreamedTerms terms, for a multiple of `rows` rows of A and C and whole panels of B, whose rows
// further below are asked for. With groups of any size in one loop the compiler runs out of registers.
template <int rows, bool passing, typename scalar_t>
void add_row_groups(const ConstMatrix<scalar_t>& a, const ConstMatrix<scalar_t>& b, int64_t ahead,
                    const Matrix<scalar_t>& c) {
  constexpr int terms = kStreamedTerms;
  // Vectors may stand for anything: what is behind a reference would be read again after each is stored.
  const scalar_t *values = a.data, *first = b.data;
  scalar_t* sums = c.data;
  const int64_t lda = a.ld, ldb = b.ld, ldc = c.ld, count = c.rows, n = c.cols;
  for (int64_t column = 0; column < n; column += kPanel<scalar_t>) {
    const scalar_t* panel = first + column;
    vec<scalar_t> factor[terms][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < terms; ++i) {
      load_row(factor[i], panel + i * ldb);
#pragma GCC unroll 2
      for (int64_t line = 0; line < kPanel<scalar_t>; line += 64 / sizeof(scalar_t)) {
        const scalar_t* below = panel + (ahead + i) * ldb + line;
        if constexpr (passing) {
          prefetch_once(below);
        } else {
          __builtin_prefetch(below);
        }
      }
    }
    for (int64_t r = 0; r < count; r += rows) {
      scalar_t* target = sums + r * ldc + column;
      vec<scalar_t> sum[rows][kVectors];
      begin_sums<rows, kVectors, scalar_t>(sum, nullptr, target, ldc, true);
#pragma GCC unroll 4
      for (int i = 0; i < terms; ++i) {
        add_term(sum, values + r * lda + i, lda, factor[i]);
      }
      end_sums(sum, target, ldc);
    }
  }
}

template <typename scalar_t>
using AddRowGroups = void (*)(const ConstMatrix<scalar_t>&, const ConstMatrix<scalar_t>&, int64_t,
                              const Matrix<scalar_t>&);

// By number of rows, less one.
template <bool passing, typename scalar_t>
constexpr std::array<AddRowGroups<scalar_t>, kStreamedRows> kAddRowGroups = {
    &add_row_groups<1, passing, scalar_t>, &add_row_groups<2, passing, scalar_t>, &add_row_groups<3, passing, scalar_t>,
    &add_row_groups<4, passing, scalar_t>};

// Of what several rows need to stream a B of n columns.
inline int64_t streamed_size(int64_t n) { return (kRowsWithoutPacking + kStreamedTerms) * n; }

// C += A B for several rows, B row by row. space holds kStreamedTerms * c.cols elements.
template <typename scalar_t>
__attribute__((noinline)) void add_streamed_rows(ConstMatrix<scalar_t> a, ConstStored<scalar_t> b, Matrix<scalar_t> c,
                                                 scalar_t* space) {
  const int64_t whole = c.cols / kPanel<scalar_t> * kPanel<scalar_t>;
  const int64_t terms = a.cols / kStreamedTerms * kStreamedTerms;
  const int64_t groups = (c.rows + kStreamedRows - 1) / kStreamedRows;
  const int64_t height = (c.rows + groups - 1) / groups, even = c.rows / height * height;
  const auto& add = b.passing ? kAddRowGroups<true, scalar_t> : kAddRowGroups<false, scalar_t>;
  const Matrix<scalar_t> columns = c.columns(0, whole);
  for (int64_t k = 0; k < terms; k += kStreamedTerms) {
    // What is widened is asked for as it is read.
    MatrixView<const scalar_t> factor{space, kStreamedTerms, whole, whole};
    int64_t ahead = 0;
    if (b.storage == Storage::kComputed) {
      factor = b.view().row_range(k, k + kStreamedTerms).columns(0, whole);
      ahead = std::min(kStreamedAhead, a.cols - k - kStreamedTerms);
    } else {
      for (int64_t i = 0; i < kStreamedTerms; ++i) {
        read_row(b, k + i, 0, whole, space + i * whole);
      }
    }
    const ConstMatrix<scalar_t> values = a.columns(k, kStreamedTerms);
    add[height - 1](values.row_range(0, even), factor, ahead, columns.row_range(0, even));
    if (even < c.rows) {
      add[c.rows - even - 1](values.row_range(even, c.rows), factor, ahead, columns.row_range(even, c.rows));
    }
  }
  add_streamed<scalar_t>(a.columns(terms, a.cols - terms), b.row_range(terms, a.cols), c.columns(0, whole));
  add_streamed<scalar_t>(a, b.columns(whole, c.cols - whole), c.columns(whole, c.cols - whole));
}

// C = [C if accumulate, or bias, or 0] + [A1 ; A2] B, B row by row. space holds streamed_size(c.cols) elements.
template <typename scalar_t>
void multiply_in_order(const Concatenated<scalar_t>& a, ConstStored<scalar_t> b, const scalar_t* bias,
                       Matrix<scalar_t> c, scalar_t* space, bool accumulate) {
  // Rows that stand far apart compete for the same lines of the cache.
  const bool one = c.rows == 1;
  const Matrix<scalar_t> sums = one ? c : Matrix<scalar_t>{space, c.rows, c.cols, c.cols};
  for (int64_t r = 0; r < c.rows; ++r) {
    if (accumulate) {
      std::copy_n(c.row(r), one ? 0 : c.cols, sums.row(r));
    } else if (bias != nullptr) {
      std::copy_n(bias, c.cols, sums.row(r));
    } else {
      std::fill_n(sums.row(r), c.cols, scalar_t(0));
    }
  }
  const auto add = [&](ConstMatrix<scalar_t> left, ConstStored<scalar_t> right) {
    if (one) {
      add_streamed<scalar_t>(left, right, sums);
    } else {
      add_streamed_rows<scalar_t>(left, right, sums, space + c.rows * c.cols);
    }
  };
  add(a.left, b.row_range(0, a.left.cols));
  add(a.right, b.row_range(a.left.cols, a.cols()));
  for (int64_t r = 0; !one && r < c.rows; ++r) {
    std::copy_n(sums.row(r), c.cols, c.row(r));
  }
}

// C = [C if accumulate, or bias, or 0] + [A1 ; A2] B. b may be without data where all its panels are laid out. panel
// holds as many elements as streamed_size(c.cols) and as a.cols() * kPanel. True: C is at least
// `least`, which it is not where B is read in order.
template <typename scalar_t>
bool multiply(const Concatenated<scalar_t>& a, ConstStored<scalar_t> b, const Panels<scalar_t>& panels,
              const scalar_t* bias, Matrix<scalar_t> c, scalar_t* panel, bool accumulate = false,
              scalar_t least = least_of<scalar_t>(Activation::kIdentity)) {
  const int64_t k = a.cols();
  constexpr int64_t panel_width = kPanel<scalar_t>;
  const bool has_panels = panels.layout.first != nullptr;
  const int64_t in_order = !has_panels ? kRowsWithoutPacking : b.data != nullptr ? kRowsBeforePanels : 0;
  if (c.rows <= in_order && c.cols >= kPanelsToStream * panel_width) {
    multiply_in_order(a, b, bias, c, panel, accumulate);
    return false;
  }
  const Operand<scalar_t> a1 = operand(a.left), a2 = operand(a.right);
  alignas(64) scalar_t edge_bias[panel_width] = {};
  const int64_t count = round_up(c.cols, panel_width) / panel_width, first = panels.begin(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = (first + i) % count * panel_width, following = (first + i + 1) % count * panel_width;
    const int64_t width = std::min(panel_width, c.cols - column);
    const bool whole = width == panel_width;
    // The register tile reads floats: elsewhere a panel is widened before.
    const bool packed = has_panels || !whole || c.rows > kRowsWithoutPacking || b.storage != Storage::kComputed;
    const PanelPlace<scalar_t> place = panels.take(column, panel);
    const scalar_t* source = packed ? place.data : b.view().data + column;
    const int64_t stride = packed ? panel_width : b.ld;
    const scalar_t* start = bias == nullptr ? nullptr : bias + column;
    if (start != nullptr && !whole) {
      std::copy_n(start, width, edge_bias);
      start = edge_bias;
    }
    Lines next = (i + 1 < count ? panels.lines(b, following, panel_width) : panels.following).or_none(source);
    int64_t row = 0;
    if (packed && !place.laid_out) {
      const bool on_the_way = whole && b.storage == Storage::kComputed && c.rows >= kRegisterTileRows;
      if (on_the_way) {
        packing_tile<scalar_t>(a1, a2, b.view().data + column, b.ld, start, c.data + column, c.ld, accumulate, least,
                               place.data, place.shared);
        row = kRegisterTileRows;
      } else {
        pack_panel<scalar_t>(b.columns(column, width), place.data);
      }
      place.share(k * panel_width, on_the_way);
    }
    for (; row < c.rows; row += kRegisterTileRows) {
      const int64_t end = std::min(row + kRegisterTileRows, c.rows);
      multiply_tile<scalar_t>(a1.from_row(row), a2.from_row(row), source, stride, start,
                              c.row_range(row, end).columns(column, width), accumulate, least, next.next(k));
    }
  }
  return true;
}

// dA = [dA +] dC Wᵀ for W (k, n): computed as (W dCᵀ)ᵀ, so that W is read once, in order, and only the few rows of dC
// are transposed. A weight in 16 bits, or a product, is first made floats, as many rows at a time as the register tile
// reads. panel holds n * (round_up(rows, kPanel) + kRegisterTileRows) elements.
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
    Lines next = Lines().or_none(a.data);
    if (in_place && i + count < w.rows) {
      next = Lines({w.at(i + count, 0), 64, count * w.ld * w.element_size() / 64});
    }
    for (int64_t row = 0; row < dc.rows; row += panel_width) {
      const int64_t width = std::min(panel_width, dc.rows - row);
      const auto tile =
          width <= lanes ? kRegisterTiles<1, scalar_t>[count - 1] : kRegisterTiles<kVectors, scalar_t>[count - 1];
      tile(a, nothing, panel + row * n, panel_width, nullptr, block, panel_width, false,
           least_of<scalar_t>(Activation::kIdentity), next.next(n));
      for (int64_t r = 0; r < width; ++r) {
        scalar_t* target = da.row(row + r) + i;
        for (int64_t j = 0; j < count; ++j) {
          target[j] = block[j * panel_width + r] + (accumulate ? target[j] : scalar_t(0));
        }
      }
    }
  }
}
