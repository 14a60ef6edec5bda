// Backward of the trunk through the own branch: a tile's input gradients, then the weight gradients item by item.
// Included once per capability, after trunk_forward.h.

template <typename scalar_t>
struct BackwardScratch {
  ProductScratch<scalar_t> product;
  scalar_t* inputs[2];
  scalar_t* aux[2];
  scalar_t* mix;
  scalar_t* scaled;  // G = dM ∘ g
  double* row;       // c, n, p and dc of a row

  BackwardScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch) {
    const Widest<scalar_t> widest(trunk);
    const int64_t rows = trunk.tile_rows;
    product = ProductScratch<scalar_t>(rows, widest.factor, true, scratch);
    for (auto& buffer : inputs) buffer = scratch.take(rows * std::max(widest.factor, widest.width));
    for (auto& buffer : aux) buffer = scratch.take(rows * widest.width);
    mix = scratch.take(widest.stream);
    scaled = scratch.take(widest.stream);
    row = scratch.template take<double>(4 * trunk.num_scenarios);
  }
};

// One row of the mutual unit's backward: dM becomes dV_t but for the gate's product, dz_g is written.
template <typename scalar_t>
void mutual_backward_row(const Trunk<scalar_t>& trunk, const Layer<scalar_t>& layer, int64_t t, const scalar_t* streams,
                         const scalar_t* alpha, const scalar_t* gate, scalar_t* d_own, scalar_t* d_gate,
                         BackwardScratch<scalar_t>& scratch) {
  const int64_t m = trunk.num_scenarios, d = layer.width;
  const scalar_t* own = streams + t * d;
  double* cosine = scratch.row;
  double* norm = cosine + m;
  double* p = norm + m;
  double* d_cosine = p + m;
  scalar_t* scaled = scratch.scaled;

  mix_streams(m, d, streams, alpha, scratch.mix);
  const bool scalar_gate = layer.gate_width == 1;
  for (int64_t i = 0; i < d; ++i) {
    scaled[i] = d_own[i] * gate[scalar_gate ? 0 : i];
  }
  if (scalar_gate) {
    d_gate[0] = static_cast<scalar_t>(dot(d_own, scratch.mix, d)) * gate[0] * (1 - gate[0]);
  } else {
    for (int64_t i = 0; i < d; ++i) {
      d_gate[i] = d_own[i] * scratch.mix[i] * gate[i] * (1 - gate[i]);
    }
  }

  const double raw_norm = std::sqrt(dot(own, own, d));
  const double own_norm = std::max(raw_norm, kNormEpsilon);
  double total = 0, mean = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (j == t) {
      continue;
    }
    const scalar_t* v = streams + j * d;
    norm[j] = clamped_norm(v, d);
    cosine[j] = dot(own, v, d) / (own_norm * norm[j]);
    p[j] = dot(scaled, v, d);
    total += cosine[j];
    mean += alpha[j] * p[j];
  }
  const bool ratio = trunk.score == Score::kRatio;
  if (ratio && std::abs(total) < kDegenerateSum) {
    return;
  }
  const double factor = ratio ? 1 / total : 1 / trunk.temperature;
  double shared = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (j != t) {
      d_cosine[j] = alpha[j] * (p[j] - mean) * factor;
      shared += d_cosine[j] * cosine[j];
    }
  }
  shared = ratio ? shared * factor : 0.0;
  double along = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (j == t) {
      continue;
    }
    d_cosine[j] -= shared;
    along += d_cosine[j] * cosine[j];
    const scalar_t weight = static_cast<scalar_t>(d_cosine[j] / (norm[j] * own_norm));
    const scalar_t* v = streams + j * d;
    for (int64_t i = 0; i < d; ++i) {
      d_own[i] += weight * v[i];
    }
  }
  if (raw_norm > kNormEpsilon) {
    const scalar_t weight = static_cast<scalar_t>(along / (own_norm * own_norm));
    for (int64_t i = 0; i < d; ++i) {
      d_own[i] -= weight * own[i];
    }
  }
}

// dM of the tile's rows becomes dV_t; dz_g is written.
template <typename scalar_t>
void mutual_backward(const Trunk<scalar_t>& trunk, const Layer<scalar_t>& layer, int64_t begin, int64_t end,
                     View<scalar_t> streams, View<scalar_t> d_own, BackwardScratch<scalar_t>& scratch) {
  const int64_t gate_width = layer.gate_width;
  for_each_segment(trunk.offsets, trunk.num_scenarios, begin, end, [&](Segment s) {
    scalar_t* d_gate = layer.grad_gate_argument + begin * gate_width;
    for (int64_t r = s.begin; r < s.end; ++r) {
      mutual_backward_row(trunk, layer, s.scenario, streams.row(r), layer.alpha + (begin + r) * trunk.num_scenarios,
                          layer.gate + (begin + r) * gate_width, d_own.row(r), d_gate + r * gate_width, scratch);
    }
    transposed_product(s.begin, s.end, 0, layer.gates, s.scenario, d_gate, gate_width, d_own.data, d_own.ld, true,
                       scratch.product);
  });
}

// The streams of the mutual layers of one tile, computed again where forward did not keep them.
template <typename scalar_t>
class TileStreams {
 public:
  TileStreams(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch) : trunk_(trunk), pass_scratch_(trunk, scratch) {
    for (int64_t l = 0; l < trunk.num_shared; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      const int64_t size = trunk.tile_rows * trunk.num_scenarios * layer.width;
      if (layer.has_mutual_unit() && layer.streams == nullptr) {
        again_.push_back(scratch.take(size));
      }
    }
  }

  void recompute(int64_t tile) {
    if (again_.empty()) {
      return;
    }
    TilePass<scalar_t> pass(trunk_, tile, pass_scratch_);
    View<scalar_t> streams{nullptr, 0};
    int64_t turn = 0;
    auto target = again_.begin();
    for (int64_t l = 0; l < trunk_.num_shared; ++l) {
      const Layer<scalar_t>& layer = trunk_.layers[l];
      const int64_t ld = trunk_.num_scenarios * layer.width;
      const View<scalar_t> out{layer.has_mutual_unit() ? *target++ : pass_scratch_.streams[turn++ % 2], ld};
      streams = pass.all_branches(l, streams, pass.rows_of(layer.aux, nullptr, layer.aux_width), {nullptr, 0}, out);
      if (layer.has_mutual_unit() && l + 1 < trunk_.num_shared) {
        const View<scalar_t> mixed{pass_scratch_.streams[turn++ % 2], ld};
        pass.mutual_table(l, streams, pass.rows_of(layer.mutual, nullptr, layer.width), mixed);
        streams = mixed;
      }
    }
  }

  View<scalar_t> of_layer(int64_t l, int64_t begin) const {
    const int64_t ld = trunk_.num_scenarios * trunk_.layers[l].width;
    if (again_.empty()) {
      return {trunk_.layers[l].streams + begin * ld, ld};
    }
    int64_t earlier = 0;
    for (int64_t i = 0; i < l; ++i) {
      earlier += trunk_.layers[i].has_mutual_unit();
    }
    return {again_[earlier], ld};
  }

 private:
  const Trunk<scalar_t>& trunk_;
  TileScratch<scalar_t> pass_scratch_;
  std::vector<scalar_t*> again_;
};

template <typename scalar_t>
int64_t backward_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  BackwardScratch<scalar_t>(trunk, scratch);
  TileStreams<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

template <typename scalar_t>
void backward_tile(const Trunk<scalar_t>& trunk, int64_t tile, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  BackwardScratch<scalar_t> scratch(trunk, pieces);
  TileStreams<scalar_t> all_streams(trunk, pieces);
  all_streams.recompute(tile);

  const int64_t begin = tile * trunk.tile_rows, end = std::min(begin + trunk.tile_rows, trunk.rows);
  const int64_t rows = end - begin;
  const auto segments = [&](auto function) {
    for_each_segment(trunk.offsets, trunk.num_scenarios, begin, end, function);
  };

  const Layer<scalar_t>& last = trunk.layers[trunk.num_layers - 1];
  View<scalar_t> d_own{scratch.inputs[0], last.width};
  View<scalar_t> d_aux{scratch.aux[0], last.aux_width};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = trunk.permutation[begin + r];
    std::copy_n(trunk.grad_own + row * last.width, last.width, d_own.row(r));
    if (last.aux_width > 0) {
      std::copy_n(trunk.grad_aux + row * last.aux_width, last.aux_width, d_aux.row(r));
    }
  }

  int64_t turn = 1;
  for (int64_t l = trunk.num_layers - 1; l >= 0; --l, turn ^= 1) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    const int64_t d = layer.width, in = layer.in_width, a = layer.aux_width;

    if (layer.has_mutual_unit()) {
      const View<scalar_t> streams = all_streams.of_layer(l, begin);
      mutual_backward(trunk, layer, begin, end, streams, d_own, scratch);
    }

    scalar_t* dz = layer.grad_argument + begin * d;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r;
      const scalar_t* z = layer.own_argument != nullptr ? layer.own_argument + row * d : nullptr;
      activate_backward(layer.activation, layer.own + row * d, z, d_own.row(r), dz + r * d, d);
    }

    // The inputs' gradient (rows, d_{l-1} + a_l); at the first layer x_l may not want its part.
    const int64_t first = l == 0 && trunk.grad_x_local == nullptr ? in : 0;
    const View<scalar_t> d_in{scratch.inputs[turn], in + a};
    segments([&](Segment s) {
      transposed_product(s.begin, s.end, first, layer.branch, s.scenario, dz, d, d_in.data, d_in.ld, false,
                         scratch.product);
    });
    d_own = {d_in.data, d_in.ld};
    if (a == 0) {
      continue;
    }
    scalar_t* dz_aux = layer.grad_aux_argument + begin * a;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = begin + r;
      scalar_t* d_a = d_aux.row(r);
      for (int64_t i = 0; i < a; ++i) {
        d_a[i] += d_in.row(r)[in + i];
      }
      const scalar_t* z = layer.aux_argument != nullptr ? layer.aux_argument + row * a : nullptr;
      activate_backward(layer.activation, layer.aux + row * a, z, d_a, dz_aux + r * a, a);
    }
    if (l > 0 || trunk.grad_x_global != nullptr) {
      d_aux = {scratch.aux[turn], layer.aux_in};
      transposed_product(0, rows, 0, layer.aux_net, 0, dz_aux, a, d_aux.data, d_aux.ld, false, scratch.product);
    }
  }

  const Layer<scalar_t>& first = trunk.layers[0];
  const int64_t width = first.in_width;
  segments([&](Segment s) {
    for (int64_t r = s.begin; r < s.end; ++r) {
      const int64_t row = trunk.permutation[begin + r];
      if (trunk.grad_x_local != nullptr) {
        const int64_t place = trunk.per_branch_input ? row * trunk.num_scenarios + s.scenario : row;
        std::copy_n(d_own.row(r), width, trunk.grad_x_local + place * width);
      }
      if (trunk.grad_x_global != nullptr && first.aux_width > 0) {
        std::copy_n(d_aux.row(r), first.aux_in, trunk.grad_x_global + row * first.aux_in);
      }
    }
  });
}

template <typename scalar_t>
void mutual_backward_tile(const Trunk<scalar_t>& trunk, int64_t tile, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  Scratch<scalar_t> pieces(block);
  BackwardScratch<scalar_t> scratch(trunk, pieces);
  const Layer<scalar_t>& layer = trunk.layers[0];
  const int64_t begin = tile * trunk.tile_rows, end = std::min(begin + trunk.tile_rows, trunk.rows);
  const int64_t d = layer.width, ld = trunk.num_scenarios * d;
  const View<scalar_t> d_own{scratch.inputs[0], d};
  for (int64_t r = 0; r < end - begin; ++r) {
    std::copy_n(trunk.grad_own + trunk.permutation[begin + r] * d, d, d_own.row(r));
  }
  mutual_backward(trunk, layer, begin, end, {layer.streams + begin * ld, ld}, d_own, scratch);
  for_each_segment(trunk.offsets, trunk.num_scenarios, begin, end, [&](Segment s) {
    for (int64_t r = s.begin; r < s.end; ++r) {
      std::copy_n(d_own.row(r), d, trunk.grad_x_local + trunk.permutation[begin + r] * ld + s.scenario * d);
    }
  });
}
