// Forward of the trunk, a tile of rows at a time. Included once per capability, after mutual.h.
//
//     A^l   = δ(A^{l−1} Wa^l + ba^l)
//     V_k^l = δ([V_k^{l−1} ; A^l] W_k^l + b_k^l)        and after a mutual layer M_k^l in its place
//     own   = V_t^L, or of a gate γ sigmoid(Z_t^L) ∘ gated

// Whether what layers read stands in bfloat16, as all their products take it: x where the caller's does, and what the
// product of the layer before gives so.
template <typename scalar_t>
bool takes_bfloat16(const Trunk<scalar_t>& trunk) {
  const bool foreign = trunk.num_shared == 0 || trunk.foreign_rounding == Rounding::kBfloat16;
  return kTakesBfloat16<scalar_t> && trunk.own_bfloat16 && foreign;
}

template <typename scalar_t>
struct ForwardScratch {
  Widest<scalar_t> widest;
  TeamScratch<scalar_t> team;
  scalar_t* x_local;
  scalar_t* aux[2];
  scalar_t* own[2];
  scalar_t* own_streams;
  scalar_t* streams[2];
  uint16_t* rounded_streams;
  uint16_t* rounded_inputs[2];  // [V^{l−1} ; A^l]
  MutualScratch<scalar_t> mutual;

  ForwardScratch(const Trunk<scalar_t>& trunk, Scratch<scalar_t>& scratch)
      : widest(trunk),
        team(trunk, widest, scratch),
        x_local(scratch.take(trunk.tile_rows() * trunk.x_local.cols)),
        aux{scratch.take(trunk.tile_rows() * widest.width), scratch.take(trunk.tile_rows() * widest.width)},
        own{scratch.take(trunk.tile_rows() * widest.stream), scratch.take(trunk.tile_rows() * widest.stream)},
        own_streams(scratch.take(trunk.tile_rows() * widest.stream)),
        streams{scratch.take(trunk.tile_rows() * trunk.num_scenarios * widest.shared),
                scratch.take(trunk.tile_rows() * trunk.num_scenarios * widest.shared)},
        rounded_streams(scratch.template take<uint16_t>(trunk.tile_rows() * trunk.num_scenarios * widest.rounded)),
        rounded_inputs{scratch.template take<uint16_t>(takes_bfloat16(trunk) ? trunk.tile_rows() * widest.factor : 0),
                       scratch.template take<uint16_t>(takes_bfloat16(trunk) ? trunk.tile_rows() * widest.factor : 0)},
        mutual(trunk, widest, team, scratch) {}
};

// The layers, on one tile. Forward runs all of them; backward with recomputation only those of the streams.
template <typename scalar_t>
class TileLayers {
 public:
  using View = MatrixView<scalar_t>;
  using ConstView = MatrixView<const scalar_t>;
  // What a layer reads: computed, or in bfloat16 where products take it so.
  using Values = StoredMatrix<const scalar_t>;

  TileLayers(const Tile<scalar_t>& tile, ForwardScratch<scalar_t>& scratch)
      : trunk_(tile.trunk()),
        tile_(tile),
        scratch_(scratch),
        takes_bfloat16_(takes_bfloat16(trunk_)),
        x_local_(place_of_x_local()) {
    for (ProductScratch<scalar_t>& product : scratch.team.products) {
      product.tile = tile.number();
    }
  }

  // Reads the tile's rows of x_l, before the layer that reads them.
  void gather_x_local() const { tile_.gather(trunk_.x_local, x_local_); }

  // Those of x_g, in the place of the auxiliary stream before the first.
  Values gather_x_global() const {
    const StoredMatrix<scalar_t> x_global = place_of_input(trunk_.x_global, scratch_.aux[1]);
    tile_.gather(trunk_.x_global, x_global);
    return x_global;
  }

  // What forward has saved, as products take it: where it stands, or in the buffer.
  Values saved_values(ConstStored<scalar_t> saved, scalar_t* buffer) const {
    return takes_bfloat16_ ? Values(saved) : Values(rows_of(saved, buffer));
  }

  // V_t, of the streams of all branches (rows, M d) the own ones.
  Values own_streams(ConstStored<scalar_t> streams, const Saved<scalar_t>& saved) const {
    const int64_t d = streams.cols / trunk_.num_scenarios;
    const bool rounded = takes_bfloat16_ && streams.storage == Storage::kBfloat16;
    const StoredMatrix<scalar_t> own =
        place(rounded, saved.own, scratch_.own_streams, d, tile_.in_bfloat16(scratch_.own_streams, d));
    tile_.for_each_segment([&](Segment s) {
      for (int64_t r = s.rows.begin; r < s.rows.end; ++r) {
        copy_row<scalar_t>(streams, r, s.scenario * d, d, own, r);
      }
    });
    save(own, saved.own);
    return own;
  }

  // The next streams of all branches.
  View next_streams(int64_t l) {
    return tile_.in(scratch_.streams[turn_++ % 2], trunk_.num_scenarios * trunk_.layers[l].width);
  }

  // Where V^l of all branches stands, and where it is rounded besides; without data: nowhere.
  struct Streams {
    StoredMatrix<scalar_t> all;
    StoredMatrix<scalar_t> rounded = {};
  };

  // saved: where they are to be saved, or without data.
  Streams place_of_streams(int64_t l, const StoredMatrix<scalar_t>& saved) {
    if (trunk_.rounds_streams(l)) {
      const int64_t cols = trunk_.num_scenarios * trunk_.layers[l].width;
      return {saved.data != nullptr ? saved : tile_.in_bfloat16(scratch_.rounded_streams, cols)};
    }
    if (saved.data != nullptr && saved.storage == Storage::kComputed) {
      return {saved};
    }
    return {next_streams(l), saved};
  }

  // A^l.
  Values auxiliary(int64_t l, const Values& previous, const Saved<scalar_t>& saved) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const bool rounded = rounds(l, layer.auxiliary);
    const StoredMatrix<scalar_t> out = place(rounded, saved.aux, scratch_.aux[l % 2], layer.aux_width, rounded_aux(l));
    const Input<scalar_t> input{previous};
    const SharedProducts<scalar_t> products(scratch_.team, tile_.rows(), 1, layer.auxiliary, trunk_.own_rounding());
    products.run(scratch_.team, [&](int64_t, Range columns, ProductScratch<scalar_t>& product) {
      prepare_rows(tile_.all(), input, layer.auxiliary, product);
      if (l >= trunk_.num_shared) {
        products.follow_with(trunk_.own_rounding(), layer.branch, tile_.first_scenario(), product);
      }
      layer_of(tile_.all(), columns, input, layer.auxiliary, 0, layer.activation, saved.aux_preact, out, product);
    });
    save(out, saved.aux);
    return out;
  }

  // V^l of all branches into their place: foreign rows in the foreign precision, own rows in the own.
  void all_branches(int64_t l, const Values& previous, const Values& aux, View own_preact, const Streams& streams) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const int64_t d = layer.width;
    const bool one_input = l == 0 && !trunk_.per_branch_input;
    const SharedProducts<scalar_t> products(scratch_.team, tile_.rows(), trunk_.num_scenarios, layer.branch,
                                            std::max(trunk_.own_rounding(), trunk_.foreign_rounding));
    products.run(scratch_.team, [&](int64_t k, Range columns, ProductScratch<scalar_t>& product) {
      const Input<scalar_t> input{stream_input(l, k, previous), aux};
      if (products.shared() || k == 0 || !one_input) {
        prepare_rows(tile_.all(), input, layer.branch, product);
      }
      if (k + 1 < trunk_.num_scenarios) {
        products.follow_with(trunk_.foreign_rounding, layer.branch, k + 1, product);
      } else if (layer.has_mutual_unit()) {
        products.follow_with(trunk_.own_rounding(), layer.gates, tile_.first_scenario(), product);
      }
      const bool in_place = streams.all.storage == Storage::kComputed;
      if (!in_place && trunk_.foreign_rounding == trunk_.own_rounding() &&
          gives_bfloat16(trunk_.own_rounding(), layer.branch, layer.activation)) {
        linear_to_bfloat16(tile_.all(), input, layer.branch, k, layer.activation, streams.all.columns(k * d, d),
                           product);
        return;
      }
      const View z = in_place ? streams.all.view().columns(k * d, d) : tile_.in(product.branch, d);
      const Activation activation = own_preact.data != nullptr ? Activation::kIdentity : layer.activation;
      const auto branch = [&](Rounding rounding, Range rows) {
        linear_of(rounding, rows, columns, input, layer.branch, k, activation, z, product);
      };
      const Range own = tile_.of_scenario(k);
      if (trunk_.foreign_rounding == trunk_.own_rounding()) {
        branch(trunk_.own_rounding(), tile_.all());
      } else {
        branch(trunk_.foreign_rounding, {0, own.begin});
        branch(trunk_.own_rounding(), own);
        branch(trunk_.foreign_rounding, {own.end, tile_.rows()});
      }
      if (own_preact.data != nullptr) {
        for (int64_t r = own.begin; r < own.end; ++r) {
          std::copy_n(z.row(r) + columns.begin, columns.size(), own_preact.row(r) + columns.begin);
        }
        activate_part(layer.activation, tile_.all(), columns, z, z);
      }
      for (const StoredMatrix<scalar_t>& target : {streams.all, streams.rounded}) {
        if (target.data != nullptr && target.storage == Storage::kBfloat16) {
          write_bfloat16<scalar_t>(z.columns(columns.begin, columns.size()),
                                   target.columns(k * d + columns.begin, columns.size()));
        }
      }
    });
  }

  // V_t^l of the own branches only.
  Values own_branch(int64_t l, const Values& previous, const Values& aux, const Saved<scalar_t>& saved) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const bool rounded = rounds(l, layer.branch);
    const StoredMatrix<scalar_t> out =
        place(rounded, saved.own, scratch_.own[l % 2], layer.width, rounded_stream(l + 1));
    const std::vector<Segment> segments = tile_.segments();
    const SharedProducts<scalar_t> products(scratch_.team, tile_.rows(), static_cast<int64_t>(segments.size()),
                                            layer.branch, trunk_.own_rounding());
    products.run(scratch_.team, [&](int64_t i, Range columns, ProductScratch<scalar_t>& product) {
      const auto [k, rows] = segments[i];
      const Input<scalar_t> input{l > 0 ? previous : stream_input(l, k, previous), aux};
      prepare_rows(rows, input, layer.branch, product);
      if (i + 1 < static_cast<int64_t>(segments.size())) {
        products.follow_with(trunk_.own_rounding(), layer.branch, segments[i + 1].scenario, product);
      }
      layer_of(rows, columns, input, layer.branch, k, layer.activation, saved.own_preact, out, product);
    });
    save(out, saved.own);
    return out;
  }

  // γ sigmoid(Z_t^L) ∘ gated into the caller's rows, Z_t^L from own_branch; sigmoid(Z_t^L) stays in its place.
  void gate(const Saved<scalar_t>& saved, const StoredMatrix<scalar_t>& callers) {
    const int64_t l = trunk_.num_layers - 1, d = callers.cols;
    const scalar_t scale = trunk_.gate_scale;
    const View own = tile_.place(saved.own, scratch_.own[l % 2], d);
    // The layer before is not read any more.
    scalar_t *gated_row = scratch_.own[(l + 1) % 2], *out_row = gated_row + trunk_.gated.cols;
    for (int64_t r = 0; r < own.rows; ++r) {
      scalar_t* z = own.row(r);
      const int64_t row = tile_.callers_row(r);
      scalar_t* out = place_of(callers, row, out_row);
      const scalar_t* gated = row_of(trunk_.gated, row, gated_row);
      for (int64_t i = 0; i < d; ++i) {
        z[i] = sigmoid(z[i]);
        out[i] = scale * z[i] * gated[i];
      }
      write_row(out, d, callers, row, 0);
    }
    tile_.save(own, saved.own);
  }

  // M_t^l.
  Values mutual_own(int64_t l, ConstStored<scalar_t> streams, const Values& own, const Saved<scalar_t>& saved) {
    const Layer<scalar_t>& layer = trunk_.layers[l];
    const bool rounded = takes_bfloat16_ && l + 1 == trunk_.num_shared && l + 1 < trunk_.num_layers;
    const StoredMatrix<scalar_t> out =
        place(rounded, saved.mutual, scratch_.own[l % 2], layer.width, rounded_stream(l + 1));
    const View gate = tile_.place(saved.gate, scratch_.mutual.gate, layer.gate_width);
    mutual_own_row(tile_, layer, streams, own, tile_.of(saved.alpha), gate, out, scratch_.mutual);
    save(out, saved.mutual);
    tile_.save(gate, saved.gate);
    return out;
  }

  // M^l of all branches, of which own is M_t^l.
  ConstView mutual_all(int64_t l, ConstView streams, ConstView own) {
    const View out = next_streams(l);
    mutual_table(tile_, trunk_.layers[l], streams, own, out, scratch_.mutual);
    return out;
  }

 private:
  // Whether V^l or A^l, δ of such a product, is to stand in bfloat16, as products of the layer that follows take it.
  bool rounds(int64_t l, const Weights<scalar_t>& weights) const {
    return takes_bfloat16_ && l + 1 < trunk_.num_layers &&
           gives_bfloat16(trunk_.own_rounding(), weights, trunk_.layers[l].activation);
  }

  // V^{l−1} and A^l where they stand in bfloat16 and are not saved: side by side, as the products read them. There is
  // no place after the last layer.
  StoredMatrix<scalar_t> rounded_stream(int64_t l) const {
    return l < trunk_.num_layers ? rounded_input(l).columns(0, trunk_.layers[l].in_width) : StoredMatrix<scalar_t>();
  }
  StoredMatrix<scalar_t> rounded_aux(int64_t l) const {
    return rounded_input(l).columns(trunk_.layers[l].in_width, trunk_.layers[l].aux_width);
  }
  StoredMatrix<scalar_t> rounded_input(int64_t l) const {
    return tile_.in_bfloat16(scratch_.rounded_inputs[l % 2], trunk_.layers[l].in_width + trunk_.layers[l].aux_width);
  }

  // Where the tile's rows of x_l or x_g are to stand, in this buffer.
  StoredMatrix<scalar_t> place_of_input(ConstStored<scalar_t> x, scalar_t* buffer) const {
    const bool rounded = takes_bfloat16_ && x.storage == Storage::kBfloat16;
    return rounded ? tile_.in_bfloat16(buffer, x.cols) : tile_.in(buffer, x.cols);
  }
  // The one view of all branches is V^0.
  StoredMatrix<scalar_t> place_of_x_local() const {
    const StoredMatrix<scalar_t> place = place_of_input(trunk_.x_local, scratch_.x_local);
    return place.storage == Storage::kBfloat16 && !trunk_.per_branch_input ? rounded_stream(0) : place;
  }

  // Where to compute, or to round, what save() is to save, or it is nowhere saved.
  StoredMatrix<scalar_t> place(bool rounded, Stored<scalar_t> saved, scalar_t* computed, int64_t width,
                               const StoredMatrix<scalar_t>& in_bfloat16) const {
    if (!rounded) {
      return tile_.place(saved, computed, width);
    }
    return saved.data != nullptr ? tile_.of(saved) : in_bfloat16;
  }

  void save(const Values& values, Stored<scalar_t> saved) const {
    if (values.storage == Storage::kComputed) {
      tile_.save(values.view(), saved);
    }
  }

  // out = δ(Z) of an own or an auxiliary layer; without data Z stands nowhere.
  void layer_of(Range rows, Range columns, const Input<scalar_t>& input, const Weights<scalar_t>& weights, int64_t i,
                Activation activation, View preact, const StoredMatrix<scalar_t>& out,
                ProductScratch<scalar_t>& product) const {
    if (out.storage == Storage::kBfloat16) {
      linear_to_bfloat16(rows, input, weights, i, activation, out, product);
      return;
    }
    const bool in_place = preact.data == nullptr;
    const View z = in_place ? out.view() : tile_.of(preact);
    linear_of(trunk_.own_rounding(), rows, columns, input, weights, i, in_place ? activation : Activation::kIdentity, z,
              product);
    if (!in_place) {
      activate_part(activation, rows, columns, z, out.view());
    }
  }

  static void activate_part(Activation activation, Range rows, Range columns, ConstView z, View out) {
    activate_rows<scalar_t>(activation, z.row_range(rows.begin, rows.end).columns(columns.begin, columns.size()),
                            out.row_range(rows.begin, rows.end).columns(columns.begin, columns.size()));
  }

  // V_k^{l-1}: x_l, or out of the streams of the layer before.
  Values stream_input(int64_t l, int64_t k, const Values& previous) const {
    const int64_t width = trunk_.layers[l].in_width;
    if (l > 0) {
      return previous.columns(k * width, width);
    }
    return x_local_.columns(trunk_.per_branch_input ? k * width : 0, width);
  }

  const Trunk<scalar_t>& trunk_;
  const Tile<scalar_t>& tile_;
  ForwardScratch<scalar_t>& scratch_;
  bool takes_bfloat16_;
  StoredMatrix<scalar_t> x_local_;
  int64_t turn_ = 0;
};

template <typename scalar_t>
int64_t forward_scratch(const Trunk<scalar_t>& trunk) {
  Scratch<scalar_t> scratch(nullptr);
  ForwardScratch<scalar_t>(trunk, scratch);
  return scratch.bytes();
}

template <typename scalar_t>
void forward_tile(const ForwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  ForwardScratch<scalar_t> scratch(trunk, pieces);
  TileLayers<scalar_t> layers(tile, scratch);

  StoredMatrix<const scalar_t> aux, own, streams;
  if (trunk.layers[0].aux_width > 0) {
    aux = layers.gather_x_global();
  }
  layers.gather_x_local();
  for (int64_t l = 0; l < trunk.num_layers; ++l) {
    const Layer<scalar_t>& layer = trunk.layers[l];
    const Saved<scalar_t>& saved = pass.saved[l];
    if (layer.aux_width > 0) {
      aux = layers.auxiliary(l, aux, saved);
    }
    if (l >= trunk.num_shared) {
      own = layers.own_branch(l, own, aux, saved);
      continue;
    }
    const auto place = layers.place_of_streams(l, tile.of(saved.streams));
    layers.all_branches(l, streams, aux, tile.of(saved.own_preact), place);
    streams = place.all;
    if (layer.has_mutual_unit() || saved.own.data != nullptr) {
      own = layers.own_streams(streams, saved);
    }
    if (layer.has_mutual_unit()) {
      own = layers.mutual_own(l, streams, own, saved);
      if (l + 1 < trunk.num_shared) {
        streams = layers.mutual_all(l, streams.view(), own.view());
      }
    }
  }
  if (trunk.gated.data != nullptr) {
    layers.gate(pass.saved[trunk.num_layers - 1], pass.own);
  } else {
    tile.scatter((trunk.all_branches ? streams : own).view(), pass.own);
  }
  tile.scatter(aux.view(), pass.aux);
}

// The mutual unit alone, on streams that are given; its scratch is that of forward_tile.
template <typename scalar_t>
void mutual_forward_tile(const ForwardPass<scalar_t>& pass, int64_t number, void* block) {
  [[maybe_unused]] const TileRegisters registers;
  const Trunk<scalar_t>& trunk = pass.trunk;
  const Tile<scalar_t> tile(trunk, number);
  Scratch<scalar_t> pieces(block);
  ForwardScratch<scalar_t> scratch(trunk, pieces);
  TileLayers<scalar_t> layers(tile, scratch);
  const StoredMatrix<const scalar_t> streams = tile.of(trunk.streams);
  const StoredMatrix<const scalar_t> own = layers.own_streams(streams, pass.saved[0]);
  tile.scatter(layers.mutual_own(0, streams, own, pass.saved[0]).view(), pass.own);
}
