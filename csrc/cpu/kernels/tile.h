// A tile of rows: its place among all rows, its runs of one scenario, its scratch memory. Included once per capability.

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Hands out 64-byte aligned pieces of one block; with a null block it only counts.
template <typename scalar_t>
class Scratch {
 public:
  explicit Scratch(void* block) : block_(static_cast<char*>(block)) {}

  template <typename element_t = scalar_t>
  element_t* take(int64_t count) {
    return take_lasting<element_t>(count);
  }

  // What stands there is still there at the next tile of the thread, if the same has been taken before it.
  template <typename element_t>
  element_t* take_lasting(int64_t count) {
    char* piece = block_ == nullptr ? nullptr : block_ + bytes_;
    bytes_ += round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(element_t)), 64);
    return reinterpret_cast<element_t*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

// Rows begin .. end of a tile.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// A run of rows of one scenario inside a tile.
struct Segment {
  int64_t scenario;
  Range rows;
};

template <typename scalar_t>
class Tile {
 public:
  Tile(const Trunk<scalar_t>& trunk, int64_t number)
      : trunk_(trunk), number_(number), begin_(trunk.tiles.begin(number)), end_(trunk.tiles.end(number)) {}

  const Trunk<scalar_t>& trunk() const { return trunk_; }
  int64_t number() const { return number_; }
  int64_t rows() const { return end_ - begin_; }
  Range all() const { return {0, rows()}; }

  // These rows of a matrix of all sorted rows.
  template <typename element_t>
  MatrixView<element_t> of(const MatrixView<element_t>& matrix) const {
    return matrix.row_range(begin_, end_);
  }

  template <typename element_t>
  StoredMatrix<element_t> of(const StoredMatrix<element_t>& matrix) const {
    return matrix.row_range(begin_, end_);
  }

  // A scratch buffer as a matrix of these rows.
  Matrix<scalar_t> in(scalar_t* buffer, int64_t width) const { return {buffer, rows(), width, width}; }

  // The same of rows in bfloat16.
  Stored<scalar_t> in_bfloat16(void* buffer, int64_t width) const {
    return {buffer, rows(), width, width, Storage::kBfloat16};
  }

  // Where to compute what save() is to save: in its place, or in the scratch buffer.
  Matrix<scalar_t> place(Stored<scalar_t> saved, scalar_t* otherwise, int64_t width) const {
    const bool in_place = saved.data != nullptr && saved.storage == Storage::kComputed;
    return in_place ? of(saved.view()) : in(otherwise, width);
  }
  void save(ConstMatrix<scalar_t> values, Stored<scalar_t> saved) const {
    if (in_16_bits(saved.storage)) {
      write_rows(values, of(saved));
    }
  }

  // Rows of scenario k, none if they lie elsewhere.
  Range of_scenario(int64_t k) const {
    return {std::clamp(trunk_.offsets[k], begin_, end_) - begin_,
            std::clamp(trunk_.offsets[k + 1], begin_, end_) - begin_};
  }

  // That of the first row.
  int64_t first_scenario() const {
    const int64_t* offsets = trunk_.offsets;
    return std::upper_bound(offsets, offsets + trunk_.num_scenarios + 1, begin_) - offsets - 1;
  }

  // Calls function(segment) for the scenarios that have rows here.
  template <typename Function>
  void for_each_segment(Function function) const {
    for (int64_t k = first_scenario(); k < trunk_.num_scenarios && trunk_.offsets[k] < end_; ++k) {
      const Range rows = of_scenario(k);
      if (rows.size() > 0) {
        function(Segment{k, rows});
      }
    }
  }

  std::vector<Segment> segments() const {
    std::vector<Segment> found;
    for_each_segment([&](Segment s) { found.push_back(s); });
    return found;
  }

  // Where row r of the tile stands in the caller's order.
  int64_t callers_row(int64_t r) const { return trunk_.permutation[begin_ + r]; }

  // Calls function(r, callers_row(r)) for all rows. Those of the caller's lie anywhere: the ones that follow are asked
  // for, to read or to write them.
  template <bool write, typename Function>
  void for_each_callers_row(const ConstStored<scalar_t>& callers, const Function& function) const {
    constexpr int64_t ahead = 8;
    for (int64_t r = -ahead; r < rows(); ++r) {
      if (r + ahead < rows()) {
        ask_for_row<write>(callers, callers_row(r + ahead));
      }
      if (r >= 0) {
        function(r, callers_row(r));
      }
    }
  }

  // Into rows that are computed or stand as the caller's do. Not inlined, nor scatter: many call them.
  __attribute__((noinline)) void gather(ConstStored<scalar_t> callers, Stored<scalar_t> sorted) const {
    for_each_callers_row<false>(
        callers, [&](int64_t r, int64_t row) { copy_row<scalar_t>(callers, row, 0, callers.cols, sorted, r); });
  }
  __attribute__((noinline)) void scatter(ConstMatrix<scalar_t> sorted, Stored<scalar_t> callers) const {
    for_each_callers_row<true>(
        callers, [&](int64_t r, int64_t row) { write_row(sorted.row(r), callers.cols, callers, row, 0); });
  }

 private:
  const Trunk<scalar_t>& trunk_;
  int64_t number_;
  int64_t begin_;
  int64_t end_;
};

// The widest of what a trunk's tiles hold, which sizes their scratch memory.
template <typename scalar_t>
struct Widest {
  int64_t width = 1;    // of any stream, branch or auxiliary, inputs included
  int64_t stream = 1;   // of a branch
  int64_t shared = 0;   // of a branch in the layers that all branches run,
  int64_t rounded = 0;  // or where these stand in bfloat16
  int64_t factor = 1;   // k of any product
  bool tables = false;  // a mutual unit needs its whole table

  explicit Widest(const Trunk<scalar_t>& trunk) {
    for (int64_t l = 0; l < trunk.num_layers; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      width = std::max({width, layer.in_width, layer.aux_in, layer.width, layer.aux_width});
      stream = std::max({stream, layer.in_width, layer.width});
      factor = std::max({factor, layer.in_width + layer.aux_width, layer.aux_in, layer.width, layer.gate_width});
      if (l < trunk.num_shared) {
        int64_t& of_streams = trunk.rounds_streams(l) ? rounded : shared;
        of_streams = std::max(of_streams, layer.width);
        tables |= layer.has_mutual_unit() && l + 1 < trunk.num_shared;
      }
    }
  }
};
