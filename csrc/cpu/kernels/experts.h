// Experts, forward and backward, a tile of rows at a time through all of them: every row trains every expert, and rows
// stand in the caller's order. Included once per capability, after trunk_backward.h.
//
//     V_k^l  = δ(V_k^{l−1} W_k^l + b_k^l)        V_k^0 = x for every expert k
//     dZ_k^l = dV_k^l ∘ δ'(Z_k^l)                dV_k^{l−1} = dZ_k^l W_k^lᵀ        dx = Σ_k dV_k^0
//
// weight_gradient.h computes the parameters' gradients from dZ.

template <typename scalar_t>
struct ExpertsForwardScratch {
  ProductScratch<scalar_t> first;  // of x, which is prepared once for all experts
  ProductScratch<scalar_t> others;
  scalar_t* x;  // in 16 bits
  scalar_t* rows[2];

  ExpertsForwardScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch)
      : ExpertsForwardScratch(trunk, Widest<scalar_t>(trunk), scratch) {}
  ExpertsForwardScratch(const Trunk<scalar_t>& trunk, const Widest<scalar_t>& widest, Scratch<scalar_t>& scratch)
      : first(trunk.tile_rows(), std::max(trunk.x_local.cols, trunk.layers[0].width), false, scratch),
        others(trunk.tile_rows(), widest.factor, false, scratch),
        x(scratch.take(in_16_bits(trunk.x_local.storage) ? trunk.tile_rows() * trunk.x_local.cols : 0)),
        rows{scratch.take(trunk.tile_rows() * widest.stream), scratch.take(trunk.tile_rows() * widest.stream)} {}
};

template <typename scalar_t>
int64_t experts_forward_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  ExpertsForwardScratch<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

// A tile's rows of expert k, of a matrix (K B, width), a view or stored.
template <typename matrix_t, typename scalar_t>
matrix_t of_expert(const Tile<scalar_t>& tile, int64_t k, const matrix_t& matrix) {
  const int64_t rows = tile.trunk().rows;
  return matrix.data == nullptr ? matrix : tile.of(matrix.row_range(k * rows, (k + 1) * rows));
}

// A tile's rows of expert k, of a matrix (B, K width).
template <typename element_t, typename scalar_t>
StoredMatrix<element_t> entry_of_expert(const Tile<scalar_t>& tile, int64_t k, const StoredMatrix<element_t>& matrix) {
  const int64_t width = matrix.cols / tile.trunk().num_scenarios;
  return tile.of(matrix).columns(k * width, width);
}

template <typename scalar_t>
void experts_forward_tile(const ForwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  ExpertsForwardScratch<scalar_t> scratch(trunk, pieces);
  scratch.first.tile = scratch.others.tile = number;
  const ConstMatrix<scalar_t> x = rows_of(tile.of(trunk.x_local), scratch.x);
  prepare_rows(tile.all(), Input<scalar_t>{x}, trunk.layers[0].branch, scratch.first);
  for (int64_t k = 0; k < trunk.num_scenarios; ++k) {
    ConstMatrix<scalar_t> previous = x;
    for (int64_t l = 0; l < trunk.num_layers; ++l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      const Saved<scalar_t>& saved = pass.saved[l];
      const Matrix<scalar_t> buffer = tile.in(scratch.rows[l % 2], layer.width);
      const Matrix<scalar_t> preact = of_expert(tile, k, saved.own_preact);
      // Products write rows close together; those of the result are far apart.
      const bool last = l + 1 == trunk.num_layers;
      const StoredMatrix<scalar_t> result = last ? entry_of_expert(tile, k, pass.own) : of_expert(tile, k, saved.own);
      const bool in_place = result.data != nullptr && result.storage == Storage::kComputed;
      const Matrix<scalar_t> out = in_place ? result.view() : buffer;
      const Matrix<scalar_t> z = preact.data != nullptr ? preact : last ? buffer : out;
      const Input<scalar_t> input{previous};
      if (l > 0) {
        prepare_rows(tile.all(), input, layer.branch, scratch.others);
      }
      linear(trunk.own_rounding(), tile.all(), input, layer.branch, k,
             z.data == out.data ? layer.activation : Activation::kIdentity, z, l > 0 ? scratch.others : scratch.first);
      if (z.data != out.data) {
        activate_rows(layer.activation, z, out);
      }
      if (result.data != nullptr) {
        write_rows(out, result);
      }
      previous = out;
    }
  }
}

template <typename scalar_t>
struct ExpertsBackwardScratch {
  ProductScratch<scalar_t> product;
  scalar_t* rows;
  // Of what stands in 16 bits: V_k, dZ_k, the gradient of x.
  scalar_t* v;
  scalar_t* dz;
  scalar_t* grad_x;

  ExpertsBackwardScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch)
      : product(trunk.tile_rows(), Widest<scalar_t>(trunk).factor, true, scratch),
        rows(scratch.take(trunk.tile_rows() * Widest<scalar_t>(trunk).stream)) {
    const bool converts = trunk.own_bfloat16 || in_16_bits(trunk.x_local.storage);
    v = scratch.take(converts ? trunk.tile_rows() * Widest<scalar_t>(trunk).stream : 0);
    dz = scratch.take(converts ? trunk.tile_rows() * Widest<scalar_t>(trunk).stream : 0);
    grad_x = scratch.take(converts ? trunk.tile_rows() * trunk.x_local.cols : 0);
  }
};

template <typename scalar_t>
int64_t experts_backward_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  ExpertsBackwardScratch<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

template <typename scalar_t>
void experts_backward_tile(const BackwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  ExpertsBackwardScratch<scalar_t> scratch(trunk, pieces);
  const int64_t last = trunk.num_layers - 1;
  const StoredMatrix<scalar_t> result = tile.of(pass.grad_x_local);
  const Matrix<scalar_t> d_x =
      result.storage == Storage::kComputed ? result.view() : tile.in(scratch.grad_x, result.cols);
  for (int64_t k = 0; k < trunk.num_scenarios; ++k) {
    ConstMatrix<scalar_t> d_v = rows_of(entry_of_expert(tile, k, pass.grad_own), scratch.rows);
    for (int64_t l = last; l >= 0; --l) {
      const Layer<scalar_t>& layer = trunk.layers[l];
      const Saved<const scalar_t>& saved = pass.saved[l];
      const ConstMatrix<scalar_t> v =
          rows_of(l == last ? entry_of_expert(tile, k, pass.out) : of_expert(tile, k, saved.own), scratch.v);
      const StoredMatrix<scalar_t> saved_dz = of_expert(tile, k, pass.gradients[l].dz);
      const bool in_place = saved_dz.storage == Storage::kComputed;
      const Matrix<scalar_t> dz = in_place ? saved_dz.view() : tile.in(scratch.dz, layer.width);
      activate_rows_backward(layer.activation, v, of_expert(tile, k, saved.own_preact), d_v, dz);
      write_rows(dz, saved_dz);
      if (l > 0) {
        const Matrix<scalar_t> d_in = tile.in(scratch.rows, layer.in_width);
        linear_dgrad(trunk.own_rounding(), tile.all(), dz, layer.branch, k, 0, d_in, false, scratch.product);
        d_v = d_in;
      } else if (pass.grad_x_local.data != nullptr) {
        linear_dgrad(trunk.own_rounding(), tile.all(), dz, layer.branch, k, 0, d_x, k > 0, scratch.product);
      }
    }
  }
  if (result.data != nullptr) {
    write_rows(d_x, result);
  }
}
