// Backward of the trunk through the own branch t of every row, a tile of rows at a time: the input gradients and those
// of the pre-activations, from which weight_gradient.h computes the parameters'. Included once per capability, after
// trunk_forward.h.

template <typename scalar_t>
struct BackwardScratch {
  Widest<scalar_t> widest;
  ThreadsTransposes<scalar_t> transposes;
  ProductScratch<scalar_t> product;
  scalar_t* inputs[2];
  scalar_t* aux[2];
  // Of what stands in 16 bits: V_t or A, and dZ_t or dZa.
  scalar_t* saved;
  scalar_t* dz;
  MutualBackwardScratch<scalar_t> mutual;

  BackwardScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch)
      : widest(trunk),
        transposes(trunk, scratch),
        product(trunk.tile_rows(), widest.factor, true, scratch),
        inputs{scratch.take(trunk.tile_rows() * std::max(widest.factor, widest.width)),
               scratch.take(trunk.tile_rows() * std::max(widest.factor, widest.width))},
        aux{scratch.take(trunk.tile_rows() * widest.width), scratch.take(trunk.tile_rows() * widest.width)},
        saved(scratch.take(trunk.own_bfloat16 ? trunk.tile_rows() * widest.width : 0)),
        dz(scratch.take(trunk.own_bfloat16 ? trunk.tile_rows() * widest.width : 0)),
        mutual(trunk, widest, product, scratch) {
    product.transposes = &transposes;
  }
  BackwardScratch(const BackwardScratch&) = delete;
};

// The streams of the mutual layers of one tile, computed again where forward did not save them.
template <typename scalar_t>
class TileStreams {
 public:
  TileStreams(const BackwardPass<scalar_t>& pass, Scratch<scalar_t>& scratch) : pass_(pass) {
    bool any_again = false;
    for (int64_t l = 0; l < pass.trunk.num_shared; ++l) {
      const Layer<scalar_t>& layer = pass.trunk.layers[l];
      const bool again = layer.has_mutual_unit() && pass.saved[l].streams.data == nullptr;
      const int64_t size = pass.trunk.tile_rows() * pass.trunk.num_scenarios * layer.width;
      void* const space = !again                    ? nullptr
                          : pass.trunk.own_bfloat16 ? static_cast<void*>(scratch.template take<uint16_t>(size))
                                                    : scratch.take(size);
      again_.push_back(space);
      any_again |= again;
    }
    if (any_again) {
      forward_scratch_.emplace(pass.trunk, scratch);
    }
  }

  void recompute(const Tile<scalar_t>& tile) {
    if (!forward_scratch_) {
      return;
    }
    const Trunk<scalar_t>& trunk = pass_.trunk;
    TileLayers<scalar_t> layers(tile, *forward_scratch_);
    layers.gather_x_local();
    StoredMatrix<const scalar_t> streams;
    for (int64_t l = 0; l < trunk.num_shared; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      const Saved<const scalar_t>& saved = pass_.saved[l];
      const StoredMatrix<const scalar_t> aux = layers.saved_values(tile.of(saved.aux), forward_scratch_->aux[0]);
      const auto place = layers.place_of_streams(l, again(l, tile));
      layers.all_branches(l, streams, aux, {}, place);
      streams = place.all;
      if (layer.has_mutual_unit() && l + 1 < trunk.num_shared) {
        streams = layers.mutual_all(l, streams.view(), rows_of(tile.of(saved.mutual), forward_scratch_->own[0]));
      }
    }
  }

  StoredMatrix<const scalar_t> of_layer(int64_t l, const Tile<scalar_t>& tile) const {
    if (again_[l] == nullptr) {
      return tile.of(pass_.saved[l].streams);
    }
    return again(l, tile);
  }

 private:
  // As forward would have saved them; without data where it did, or nobody reads them.
  StoredMatrix<scalar_t> again(int64_t l, const Tile<scalar_t>& tile) const {
    const int64_t cols = pass_.trunk.num_scenarios * pass_.trunk.layers[l].width;
    const Storage storage = pass_.trunk.own_bfloat16 ? Storage::kBfloat16 : Storage::kComputed;
    return {again_[l], tile.rows(), cols, cols, storage};
  }

  const BackwardPass<scalar_t>& pass_;
  std::optional<ForwardScratch<scalar_t>> forward_scratch_;  // where any are
  std::vector<void*> again_;  // of every shared layer; null where its streams are not computed again
};

template <typename scalar_t>
int64_t backward_scratch(const BackwardPass<scalar_t>& pass) {
  Scratch<scalar_t> scratch(nullptr);
  BackwardScratch<scalar_t>(pass.trunk, scratch);
  TileStreams<scalar_t>(pass, scratch);
  return scratch.bytes();
}

template <typename scalar_t>
void begin_backward(const BackwardPass<scalar_t>& pass, void* block) {
  // The first piece.
  Scratch<scalar_t> pieces(block);
  ThreadsTransposes<scalar_t>(pass.trunk, pieces).begin();
}

// The own stream's gradient into the caller's of x_local, whose foreign views receive nothing.
template <typename scalar_t>
void scatter_own(const Tile<scalar_t>& tile, Matrix<scalar_t> d_own, Stored<scalar_t> grad_x_local) {
  if (!tile.trunk().per_branch_input) {
    tile.scatter(d_own, grad_x_local);
    return;
  }
  tile.for_each_segment([&](Segment s) {
    for (int64_t r = s.rows.begin; r < s.rows.end; ++r) {
      write_row(d_own.row(r), d_own.cols, grad_x_local, tile.callers_row(r), s.scenario * d_own.cols);
    }
  });
}

// Of a gate, σ = sigmoid(Z_t^L): dgated = γ σ ∘ down into the caller's rows, and dZ_t^L = dgated ∘ gated ∘ (1 − σ).
// sigma is σ, and buffer holds three rows of it.
template <typename scalar_t>
void gate_backward(const Tile<scalar_t>& tile, const BackwardPass<scalar_t>& pass, ConstMatrix<scalar_t> sigmas,
                   Matrix<scalar_t> dz, scalar_t* buffer) {
  const Trunk<scalar_t>& trunk = pass.trunk;
  const scalar_t scale = trunk.gate_scale;
  for (int64_t r = 0; r < tile.rows(); ++r) {
    const int64_t row = tile.callers_row(r);
    const scalar_t* sigma = sigmas.row(r);
    const scalar_t* down = row_of(pass.grad_own, row, buffer);
    const scalar_t* gated = row_of(trunk.gated, row, buffer + dz.cols);
    scalar_t *d_gated = place_of(pass.grad_gated, row, buffer + 2 * dz.cols), *d_z = dz.row(r);
    for (int64_t i = 0; i < dz.cols; ++i) {
      const scalar_t d_scaled = scale * sigma[i] * down[i];
      d_gated[i] = d_scaled;
      d_z[i] = d_scaled * gated[i] * (1 - sigma[i]);
    }
    write_row(d_gated, dz.cols, pass.grad_gated, row, 0);
  }
}

// For l = L..1. dV_t^L and dA^L are the cotangents, dA^l = 0 for l < L; V_t^{l−1} is what layer l read, M_t^{l−1} after
// a mutual unit.
//
//     dM = dV_t^l, and dV_t^l as in mutual.h         if layer l has a mutual unit
//     dZ_t^l = dV_t^l ∘ δ'(Z_t^l)
//     [dV_t^{l−1} ; dA] = dZ_t^l W_t^lᵀ              dA^l += dA
//     dZa^l  = dA^l ∘ δ'(Za^l)
//     dA^{l−1} += dZa^l Wa^lᵀ
template <typename scalar_t>
void backward_tile(const BackwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  BackwardScratch<scalar_t> scratch(trunk, pieces);
  TileStreams<scalar_t> all_streams(pass, pieces);
  all_streams.recompute(tile);

  Matrix<scalar_t> d_own = tile.in(scratch.inputs[0], pass.grad_own.cols);
  Matrix<scalar_t> d_aux = tile.in(scratch.aux[0], pass.grad_aux.cols);
  if (trunk.gated.data != nullptr) {
    const ConstMatrix<scalar_t> sigmas = rows_of(tile.of(pass.saved[trunk.num_layers - 1].own), scratch.saved);
    gate_backward(tile, pass, sigmas, d_own, scratch.inputs[1]);
  } else {
    tile.gather(pass.grad_own, d_own);
  }
  tile.gather(pass.grad_aux, d_aux);

  int64_t turn = 1;
  for (int64_t l = trunk.num_layers - 1; l >= 0; --l, turn ^= 1) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    const Saved<const scalar_t>& saved = pass.saved[l];
    const LayerGradients<scalar_t>& gradients = pass.gradients[l];
    const int64_t in = layer.in_width, a = layer.aux_width;

    if (layer.has_mutual_unit()) {
      const Matrix<scalar_t> dz_gate = tile.place(gradients.dz_gate, scratch.dz, layer.gate_width);
      mutual_backward(tile, layer, saved, all_streams.of_layer(l, tile), d_own, dz_gate, scratch.mutual);
      tile.save(dz_gate, gradients.dz_gate);
    }
    const Matrix<scalar_t> dz = tile.place(gradients.dz, scratch.dz, layer.width);
    activate_rows_backward(layer.activation, rows_of(tile.of(saved.own), scratch.saved), tile.of(saved.own_preact),
                           d_own, dz);
    tile.save(dz, gradients.dz);
    // At the first layer x_l may not want its part.
    const int64_t first = l == 0 && pass.grad_x_local.data == nullptr ? in : 0;
    const Matrix<scalar_t> d_in = tile.in(scratch.inputs[turn], in + a);
    tile.for_each_segment([&](Segment s) {
      linear_dgrad(trunk.own_rounding(), s.rows, dz, layer.branch, s.scenario, first, d_in, false, scratch.product);
    });
    d_own = d_in.columns(0, in);
    if (a == 0) {
      continue;
    }
    for (int64_t r = 0; r < tile.rows(); ++r) {
      scalar_t* d_a = d_aux.row(r);
      for (int64_t i = 0; i < a; ++i) {
        d_a[i] += d_in.row(r)[in + i];
      }
    }
    const Matrix<scalar_t> dz_aux = tile.place(gradients.dz_aux, scratch.dz, a);
    activate_rows_backward(layer.activation, rows_of(tile.of(saved.aux), scratch.saved), tile.of(saved.aux_preact),
                           d_aux, dz_aux);
    tile.save(dz_aux, gradients.dz_aux);
    if (l > 0 || pass.grad_x_global.data != nullptr) {
      d_aux = tile.in(scratch.aux[turn], layer.aux_in);
      linear_dgrad(trunk.own_rounding(), tile.all(), dz_aux, layer.auxiliary, 0, 0, d_aux, false, scratch.product);
    }
  }

  if (pass.grad_x_local.data != nullptr) {
    scatter_own(tile, d_own, pass.grad_x_local);
  }
  if (pass.grad_x_global.data != nullptr) {
    tile.scatter(d_aux, pass.grad_x_global);
  }
}

template <typename scalar_t>
void mutual_backward_tile(const BackwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  BackwardScratch<scalar_t> scratch(trunk, pieces);
  const Matrix<scalar_t> d_own = tile.in(scratch.inputs[0], pass.grad_own.cols);
  tile.gather(pass.grad_own, d_own);
  mutual_backward(tile, trunk.layers[0], pass.saved[0], StoredMatrix<const scalar_t>(tile.of(trunk.streams)), d_own,
                  tile.of(pass.gradients[0].dz_gate.view()), scratch.mutual);
  scatter_own(tile, d_own, pass.grad_x_local);
}
