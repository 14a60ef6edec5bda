// Forward tile, backward tile and weight-gradient item of the trunk. Included once per capability.

template <typename scalar_t>
struct Widest {
  int64_t width = 1;   // of any stream, branch or auxiliary, inputs included
  int64_t stream = 1;  // of a branch
  int64_t shared = 0;  // of a branch in the layers that all branches run
  int64_t factor = 1;  // k of any product
  int64_t tables = 0;  // 1 if a mutual unit needs its whole table

  explicit Widest(const Trunk<scalar_t>& trunk) {
    for (int64_t l = 0; l < trunk.num_layers; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      width = std::max({width, layer.in_width, layer.aux_in, layer.width, layer.aux_width});
      stream = std::max({stream, layer.in_width, layer.width});
      factor = std::max({factor, layer.in_width + layer.aux_width, layer.aux_in, layer.width, layer.gate_width});
      if (l < trunk.num_shared) {
        shared = std::max(shared, layer.width);
        tables |= layer.has_mutual_unit() && l + 1 < trunk.num_shared;
      }
    }
  }
};

// A run of rows of one scenario inside a tile, in rows of the tile.
struct Segment {
  int64_t scenario;
  int64_t begin;
  int64_t end;
  int64_t rows() const { return end - begin; }
};

// Calls function(segment) for the scenarios that have rows in begin .. end.
template <typename Function>
inline void for_each_segment(const int64_t* offsets, int64_t num_scenarios, int64_t begin, int64_t end,
                             Function function) {
  int64_t k = std::upper_bound(offsets, offsets + num_scenarios + 1, begin) - offsets - 1;
  for (; k < num_scenarios && offsets[k] < end; ++k) {
    const int64_t first = std::max(offsets[k], begin), last = std::min(offsets[k + 1], end);
    if (first < last) {
      function(Segment{k, first - begin, last - begin});
    }
  }
}

// Where a stream of a tile lies: element (row, i) at data[row * ld + i].
template <typename scalar_t>
struct View {
  scalar_t* data;
  int64_t ld;
  scalar_t* row(int64_t r) const { return data + r * ld; }
  Operand<scalar_t> operand(int64_t first_row, int64_t k) const { return {data + first_row * ld, ld, 1, k}; }
};

// Everything a tile needs while it runs through the trunk.
template <typename scalar_t>
struct TileScratch {
  ProductScratch<scalar_t> product;
  scalar_t* aux[2];
  scalar_t* own[2];
  scalar_t* argument;
  scalar_t* streams[2];
  scalar_t* gate;
  scalar_t* mix;
  double* row;        // a row's cosines and norms
  scalar_t* weights;  // a foreign row of α

  TileScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch) {
    const Widest<scalar_t> widest(trunk);
    const int64_t rows = trunk.tile_rows, m = trunk.num_scenarios;
    product = ProductScratch<scalar_t>(rows, widest.factor, false, scratch);
    for (auto& buffer : aux) buffer = scratch.take(rows * widest.width);
    for (auto& buffer : own) buffer = scratch.take(rows * widest.stream);
    argument = scratch.take(rows * widest.width);
    for (auto& buffer : streams) buffer = scratch.take(rows * m * widest.shared);
    gate = scratch.take(rows * widest.stream * (widest.tables ? m : 1));
    mix = scratch.take(widest.stream * (widest.tables ? m : 1));
    row = scratch.template take<double>(m * (widest.tables ? m : 1) + m);
    weights = scratch.take(m);
  }
};

template <typename scalar_t>
inline void activate_rows(Activation activation, int64_t rows, int64_t n, View<scalar_t> z, View<scalar_t> v) {
  for (int64_t r = 0; r < rows; ++r) {
    activate(activation, z.row(r), v.row(r), n);
  }
}

// One pass of a tile through the layers. Forward runs all of it; backward with recomputation only the streams.
template <typename scalar_t>
class TilePass {
 public:
  TilePass(const Trunk<scalar_t>& trunk, int64_t tile, TileScratch<scalar_t>& scratch)
      : trunk_(trunk),
        scratch_(scratch),
        begin_(tile * trunk.tile_rows),
        end_(std::min(begin_ + trunk.tile_rows, trunk.rows)) {}

  int64_t begin() const { return begin_; }
  int64_t rows() const { return end_ - begin_; }

  template <typename Function>
  void segments(Function function) const {
    for_each_segment(trunk_.offsets, trunk_.num_scenarios, begin_, end_, function);
  }

  // This tile's rows of a (B, width) buffer, or the scratch where there is none.
  View<scalar_t> rows_of(scalar_t* kept, scalar_t* otherwise, int64_t width) const {
    return {kept != nullptr ? kept + begin_ * width : otherwise, width};
  }

  // The own streams, out of those of all branches.
  void copy_own(View<scalar_t> streams, int64_t d, View<scalar_t> own) const {
    segments([&](Segment s) {
      for (int64_t r = s.begin; r < s.end; ++r) {
        std::copy_n(streams.row(r) + s.scenario * d, d, own.row(r));
      }
    });
  }

  // Branch k's input of layer l: x_l, or the streams of the layer before.
  View<scalar_t> stream_input(int64_t l, int64_t k, View<scalar_t> previous) const {
    const int64_t width = trunk_.layers[l].in_width;
    if (l > 0) {
      return {previous.data + k * width, previous.ld};
    }
    scalar_t* x = const_cast<scalar_t*>(trunk_.x_local);
    const int64_t ld = trunk_.per_branch_input ? trunk_.num_scenarios * width : width;
    return {x + begin_ * ld + (trunk_.per_branch_input ? k * width : 0), ld};
  }

  // A^l = δ(A^{l-1} Wa + ba).
  View<scalar_t> auxiliary(int64_t l, View<scalar_t> previous, bool keep) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const View<scalar_t> out = rows_of(keep ? layer.aux : nullptr, scratch_.aux[l % 2], layer.aux_width);
    const View<scalar_t> z = derivative_needs_argument(layer.activation) && keep
                                 ? rows_of(layer.aux_argument, scratch_.argument, layer.aux_width)
                                 : out;
    const Operand<scalar_t> a = previous.operand(0, layer.aux_in);
    prepare_rows(0, rows(), a, nothing(a), layer.aux_net, scratch_.product);
    product(trunk_.own_bfloat16, 0, rows(), a, nothing(a), layer.aux_net, 0, z.data, z.ld, scratch_.product);
    activate_rows(layer.activation, rows(), layer.aux_width, z, out);
    return out;
  }

  // V of all branches: foreign rows in the foreign precision, own rows in the own.
  View<scalar_t> all_branches(int64_t l, View<scalar_t> previous, View<scalar_t> aux, View<scalar_t> argument,
                              View<scalar_t> out) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const int64_t m = trunk_.num_scenarios, d = layer.width;
    const bool one_input = l == 0 && !trunk_.per_branch_input;
    for (int64_t k = 0; k < m; ++k) {
      const View<scalar_t> input = stream_input(l, k, previous), target{out.data + k * d, out.ld};
      if (k == 0 || !one_input) {
        prepare_branch(l, 0, rows(), input, aux);
      }
      if (trunk_.foreign_bfloat16 == trunk_.own_bfloat16) {
        branch(l, k, 0, rows(), trunk_.own_bfloat16, input, aux, target);
        continue;
      }
      const int64_t first = std::clamp(trunk_.offsets[k], begin_, end_) - begin_;
      const int64_t last = std::clamp(trunk_.offsets[k + 1], begin_, end_) - begin_;
      branch(l, k, 0, first, trunk_.foreign_bfloat16, input, aux, target);
      branch(l, k, first, last, trunk_.own_bfloat16, input, aux, target);
      branch(l, k, last, rows(), trunk_.foreign_bfloat16, input, aux, target);
    }
    if (argument.data != nullptr) {
      copy_own(out, d, argument);
    }
    activate_rows(layer.activation, rows(), m * d, out, out);
    return out;
  }

  // V_t of the own branches only.
  View<scalar_t> own_branch(int64_t l, View<scalar_t> previous, View<scalar_t> aux) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const View<scalar_t> out = rows_of(layer.own, scratch_.own[l % 2], layer.width);
    const View<scalar_t> z = layer.own_argument != nullptr ? rows_of(layer.own_argument, nullptr, layer.width) : out;
    segments([&](Segment s) {
      const View<scalar_t> input = l > 0 ? previous : stream_input(l, s.scenario, previous);
      prepare_branch(l, s.begin, s.end, input, aux);
      branch(l, s.scenario, s.begin, s.end, trunk_.own_bfloat16, input, aux, z);
    });
    activate_rows(layer.activation, rows(), layer.width, z, out);
    return out;
  }

  // The own row of the mutual unit: α and M_t.
  View<scalar_t> mutual_own_row(int64_t l, View<scalar_t> streams) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const int64_t m = trunk_.num_scenarios, d = layer.width, width = layer.gate_width;
    const View<scalar_t> gate = rows_of(layer.gate, scratch_.gate, width);
    const View<scalar_t> out = rows_of(layer.mutual, scratch_.own[l % 2], d);
    const View<scalar_t> alpha = rows_of(layer.alpha, nullptr, m);
    segments([&](Segment s) {
      const View<scalar_t> own{streams.data + s.scenario * d, streams.ld};
      gates(l, s.scenario, s.begin, s.end, trunk_.own_bfloat16, own, gate);
      for (int64_t r = s.begin; r < s.end; ++r) {
        const scalar_t* v = streams.row(r);
        double* cosine = scratch_.row;
        const double own_norm = clamped_norm(v + s.scenario * d, d);
        for (int64_t j = 0; j < m; ++j) {
          cosine[j] =
              j == s.scenario ? 0.0 : dot(v + s.scenario * d, v + j * d, d) / (own_norm * clamped_norm(v + j * d, d));
        }
        score_weights(trunk_, cosine, s.scenario, alpha.row(r));
        mix_streams(m, d, v, alpha.row(r), scratch_.mix);
        add_gated(d, own.row(r), gate.row(r), width, scratch_.mix, out.row(r));
      }
    });
    return out;
  }

  // The whole table: M_i of every branch into out, the own one from own.
  void mutual_table(int64_t l, View<scalar_t> streams, View<scalar_t> own, View<scalar_t> out) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const int64_t m = trunk_.num_scenarios, d = layer.width, width = layer.gate_width;
    const View<scalar_t> gate{scratch_.gate, m * width};
    for (int64_t k = 0; k < m; ++k) {
      gates(l, k, 0, rows(), trunk_.foreign_bfloat16, {streams.data + k * d, streams.ld},
            {gate.data + k * width, gate.ld});
    }
    double* cosine = scratch_.row;
    double* norm = cosine + m * m;
    scalar_t* alpha = scratch_.weights;
    segments([&](Segment s) {
      for (int64_t r = s.begin; r < s.end; ++r) {
        const scalar_t* v = streams.row(r);
        for (int64_t i = 0; i < m; ++i) {
          norm[i] = clamped_norm(v + i * d, d);
          for (int64_t j = 0; j < i; ++j) {
            cosine[i * m + j] = cosine[j * m + i] = dot(v + i * d, v + j * d, d) / (norm[i] * norm[j]);
          }
          cosine[i * m + i] = 0;
        }
        for (int64_t i = 0; i < m; ++i) {
          if (i == s.scenario) {
            std::copy_n(own.row(r), d, out.row(r) + i * d);
            continue;
          }
          score_weights(trunk_, cosine + i * m, i, alpha);
          mix_streams(m, d, v, alpha, scratch_.mix);
          add_gated(d, v + i * d, gate.row(r) + i * width, width, scratch_.mix, out.row(r) + i * d);
        }
      }
    });
  }

 private:
  static Operand<scalar_t> nothing(const Operand<scalar_t>& a) { return {a.data, 0, 1, 0}; }

  void prepare_branch(int64_t l, int64_t first, int64_t last, View<scalar_t> input, View<scalar_t> aux) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    prepare_rows(first, last, input.operand(0, layer.in_width), aux.operand(0, layer.aux_width), layer.branch,
                 scratch_.product);
  }

  // z of branch k for rows first .. last.
  void branch(int64_t l, int64_t k, int64_t first, int64_t last, bool bfloat16, View<scalar_t> input,
              View<scalar_t> aux, View<scalar_t> z) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    product(bfloat16, first, last, input.operand(0, layer.in_width), aux.operand(0, layer.aux_width), layer.branch, k,
            z.data, z.ld, scratch_.product);
  }

  // g = sigmoid(V U + u) of branch k for rows first .. last.
  void gates(int64_t l, int64_t k, int64_t first, int64_t last, bool bfloat16, View<scalar_t> v, View<scalar_t> gate) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const int64_t d = layer.width, width = layer.gate_width;
    const Operand<scalar_t> a = v.operand(0, d);
    prepare_rows(first, last, a, nothing(a), layer.gates, scratch_.product);
    product(bfloat16, first, last, a, nothing(a), layer.gates, k, gate.data, gate.ld, scratch_.product);
    for (int64_t r = first; r < last; ++r) {
      scalar_t* g = gate.row(r);
      for (int64_t i = 0; i < width; ++i) {
        g[i] = sigmoid(g[i]);
      }
    }
  }

  const Trunk<scalar_t>& trunk_;
  TileScratch<scalar_t>& scratch_;
  int64_t begin_;
  int64_t end_;
};

template <typename scalar_t>
int64_t forward_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  TileScratch<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

template <typename scalar_t>
void forward_tile(const Trunk<scalar_t>& trunk, int64_t tile, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  TileScratch<scalar_t> scratch(trunk, pieces);
  TilePass<scalar_t> pass(trunk, tile, scratch);
  const int64_t m = trunk.num_scenarios;

  View<scalar_t> aux{const_cast<scalar_t*>(trunk.x_global) + pass.begin() * trunk.layers[0].aux_in,
                     trunk.layers[0].aux_in};
  View<scalar_t> streams{nullptr, 0}, own{nullptr, 0};
  int64_t turn = 0;
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    const int64_t d = layer.width;
    if (layer.aux_width > 0) {
      aux = pass.auxiliary(l, aux, true);
    }
    if (l >= trunk.num_shared) {
      own = pass.own_branch(l, own, aux);
      continue;
    }
    const View<scalar_t> out = layer.streams != nullptr ? View<scalar_t>{layer.streams + pass.begin() * m * d, m * d}
                                                        : View<scalar_t>{scratch.streams[turn++ % 2], m * d};
    const View<scalar_t> argument =
        layer.own_argument != nullptr ? pass.rows_of(layer.own_argument, nullptr, d) : View<scalar_t>{nullptr, 0};
    streams = pass.all_branches(l, streams, aux, argument, out);
    if (layer.own != nullptr) {
      pass.copy_own(streams, d, pass.rows_of(layer.own, nullptr, d));
    }
    if (layer.has_mutual_unit()) {
      own = pass.mutual_own_row(l, streams);
      if (l + 1 < trunk.num_shared) {
        const View<scalar_t> mixed{scratch.streams[turn++ % 2], m * d};
        pass.mutual_table(l, streams, own, mixed);
        streams = mixed;
      }
    }
  }

  const Layer<scalar_t>& last = trunk.layers[trunk.num_layers - 1];
  const View<scalar_t> result = trunk.all_branches ? streams : own;
  const int64_t result_width = trunk.all_branches ? m * last.width : last.width;
  for (int64_t r = 0; r < pass.rows(); ++r) {
    const int64_t row = trunk.permutation[pass.begin() + r];
    std::copy_n(result.row(r), result_width, trunk.out_own + row * result_width);
    if (last.aux_width > 0) {
      std::copy_n(aux.row(r), last.aux_width, trunk.out_aux + row * last.aux_width);
    }
  }
}

// The mutual unit alone, on streams that are given; its scratch is that of forward_tile.
template <typename scalar_t>
void mutual_forward_tile(const Trunk<scalar_t>& trunk, int64_t tile, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  TileScratch<scalar_t> scratch(trunk, pieces);
  TilePass<scalar_t> pass(trunk, tile, scratch);
  const Layer<scalar_t>& layer = trunk.layers[0];
  const int64_t d = layer.width, ld = trunk.num_scenarios * d;
  const View<scalar_t> streams = pass.rows_of(layer.streams, nullptr, ld);
  if (layer.own != nullptr) {
    pass.copy_own(streams, d, pass.rows_of(layer.own, nullptr, d));
  }
  const View<scalar_t> own = pass.mutual_own_row(0, streams);
  for (int64_t r = 0; r < pass.rows(); ++r) {
    std::copy_n(own.row(r), d, trunk.out_own + trunk.permutation[pass.begin() + r] * d);
  }
}
