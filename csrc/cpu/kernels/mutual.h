// The mutual unit, forward and backward. Included once per capability, after linear.h.
//
//     c_ij = ⟨V_i, V_j⟩ / (n_i n_j),  n_i = max(‖V_i‖, ε)
//     α_ij = softmax over j ≠ i of  c_ij / Σ_{j≠i} c_ij,  or of  c_ij / τ
//     g_i  = sigmoid(V_i U_i + u_i)
//     M_i  = V_i + g_i ∘ Σ_{j≠i} α_ij V_j

constexpr double kNormEpsilon = 1e-8;
constexpr double kDegenerateSum = 1e-6;

// α over j ≠ own from the cosines, 0 at own. α may take the place of the cosines.
template <typename scalar_t, typename alpha_t>
inline void score_weights(const Trunk<scalar_t>& trunk, const double* cosine, int64_t own, alpha_t* alpha) {
  const int64_t m = trunk.num_scenarios;
  double total = 0;
  for (int64_t j = 0; j < m; ++j) {
    total += j == own ? 0.0 : cosine[j];
  }
  const double factor = trunk.score == Score::kSoftmax     ? 1 / trunk.temperature
                        : std::abs(total) < kDegenerateSum ? 0.0
                                                           : 1 / total;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < m; ++j) {
    largest = j == own ? largest : std::max(largest, cosine[j] * factor);
  }
  double normaliser = 0;
  for (int64_t j = 0; j < m; ++j) {
    normaliser += j == own ? 0.0 : std::exp(cosine[j] * factor - largest);
  }
  for (int64_t j = 0; j < m; ++j) {
    alpha[j] = j == own ? alpha_t(0) : alpha_t(std::exp(cosine[j] * factor - largest) / normaliser);
  }
}

// Σ_j α_j V_j over all branches, streams of one row (M, d).
template <typename element_t, typename scalar_t>
inline void mix_streams(int64_t m, int64_t d, const element_t* streams, const scalar_t* alpha, scalar_t* mix) {
  constexpr int64_t lanes = kLanes<scalar_t>, vectors = 4;
  int64_t i = 0;
  for (; i + vectors * lanes <= d; i += vectors * lanes) {
    vec<scalar_t> sums[vectors] = {};
    for (int64_t j = 0; j < m; ++j) {
      if (alpha[j] != 0) {
        const element_t* v = streams + j * d + i;
#pragma GCC unroll 4
        for (int64_t vector = 0; vector < vectors; ++vector) {
          sums[vector] += alpha[j] * load_widened(v + vector * lanes);
        }
      }
    }
    for (int64_t vector = 0; vector < vectors; ++vector) {
      store(mix + i + vector * lanes, sums[vector]);
    }
  }
  for (; i < d; ++i) {
    stay_scalar();
    scalar_t sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      sum += alpha[j] == 0 ? 0 : alpha[j] * widened(streams[j * d + i]);
    }
    mix[i] = sum;
  }
}

inline double clamped_norm(double squared) { return std::max(std::sqrt(squared), kNormEpsilon); }

template <typename scalar_t>
inline double clamped_norm(const scalar_t* v, int64_t d) {
  return clamped_norm(dot(v, v, d));
}

// ⟨V_j, V_j⟩ and ⟨V_j, V_t⟩, of which V_t is given in double, too. The next row's V_j stands `next` behind.
template <typename scalar_t>
inline Dots<1> dots_with_own(const scalar_t* v, const scalar_t*, const double* own, int64_t d, int64_t next) {
  for (int64_t i = 0; i < d; i += 64 / static_cast<int64_t>(sizeof(scalar_t))) {
    __builtin_prefetch(v + i + next);
  }
  return dots<1>(v, {own}, d);
}

inline double sum_in_double(vec<float> x) {
  constexpr int half = kLanes<double>;
  alignas(64) float lanes[2 * half];
  store(lanes, x);
  return sum<double>(load_double(lanes) + load_double(lanes + half));
}

// Of rounded streams, where V_t in double is not read. Products of bfloat16 are exact in float, and sums of few of them
// are far closer than the streams are; what the lanes have summed is summed in double.
inline Dots<1> dots_with_own(const Bfloat16* v, const float* own, const double*, int64_t d, int64_t next) {
  constexpr int lanes = kLanes<float>, chains = 2;
  vec<float> squared[chains] = {}, products[chains] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= d; i += chains * lanes) {
    __builtin_prefetch(v + i + next);
#pragma GCC unroll 2
    for (int chain = 0; chain < chains; ++chain) {
      const vec<float> x = load_widened(v + i + chain * lanes);
      squared[chain] += x * x;
      products[chain] += x * load(own + i + chain * lanes);
    }
  }
  Dots<1> found{sum_in_double(squared[0] + squared[1]), {sum_in_double(products[0] + products[1])}};
  for (; i < d; ++i) {
    stay_scalar();
    const double x = static_cast<double>(widened(v[i]));
    found.squared += x * x;
    found.with[0] += x * static_cast<double>(own[i]);
  }
  return found;
}

// V + g ∘ mix for one row; a scalar gate has one value.
template <typename scalar_t>
inline void add_gated(int64_t d, const scalar_t* v, const scalar_t* gate, int64_t gate_width, const scalar_t* mix,
                      scalar_t* out) {
  if (gate_width == 1) {
    for (int64_t i = 0; i < d; ++i) {
      out[i] = v[i] + gate[0] * mix[i];
    }
    return;
  }
  for (int64_t i = 0; i < d; ++i) {
    out[i] = v[i] + gate[i] * mix[i];
  }
}

template <typename scalar_t>
struct MutualScratch {
  scalar_t* gate;   // of a tile's rows; of all branches where a unit needs its whole table
  scalar_t* mixes;  // Σ_j α_j V_j of a row, one a thread
  double* cosines;  // of a row, and norms, one a thread
  double* owns;     // V_t of a row, one a thread
  scalar_t* rows;   // the same as it is computed, and M_t
  int64_t width;    // of a mix
  int64_t numbers;  // cosines and norms of a row
  scalar_t* alpha;  // a foreign row of α
  TeamScratch<scalar_t>& team;

  MutualScratch(const Trunk<scalar_t>& trunk, const Widest<scalar_t>& widest, TeamScratch<scalar_t>& products,
                Scratch<scalar_t>& scratch)
      : team(products) {
    const int64_t m = trunk.num_scenarios, branches = widest.tables ? m : 1;
    gate = scratch.take(trunk.tile_rows() * widest.stream * branches);
    width = widest.stream;
    numbers = m * branches + m;
    mixes = scratch.take(trunk.team.workers * width);
    cosines = scratch.template take<double>(trunk.team.workers * numbers);
    owns = scratch.template take<double>(trunk.team.workers * width);
    rows = scratch.take(trunk.team.workers * 2 * width);
    alpha = scratch.take(m);
  }
};

// g of these rows and branches. Of branch k the stream begins at column k * from of `streams`, g at k * to of `gate`.
template <typename scalar_t>
void gates(Rounding rounding, const Tile<scalar_t>& tile, const std::vector<Segment>& of, ConstStored<scalar_t> streams,
           int64_t from, const Layer<scalar_t>& layer, Matrix<scalar_t> gate, int64_t to,
           TeamScratch<scalar_t>& scratch) {
  const int64_t d = layer.width;
  const SharedProducts<scalar_t> products(scratch, tile.rows(), static_cast<int64_t>(of.size()), layer.gates, rounding);
  products.run(scratch, [&](int64_t i, Range columns, ProductScratch<scalar_t>& product) {
    const auto [k, rows] = of[i];
    const Input<scalar_t> input{streams.columns(k * from, d)};
    const Matrix<scalar_t> target = gate.columns(k * to, layer.gate_width);
    prepare_rows(rows, input, layer.gates, product);
    if (i + 1 < static_cast<int64_t>(of.size())) {
      products.follow_with(rounding, layer.gates, of[i + 1].scenario, product);
    }
    linear_of(rounding, rows, columns, input, layer.gates, k, Activation::kIdentity, target, product);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      scalar_t* g = target.row(r);
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        g[column] = sigmoid(g[column]);
      }
    }
  });
}

// The own row t of the table: α_t, g_t and M_t of a tile's rows, from the streams of all branches and V_t.
template <typename scalar_t>
void mutual_own_row(const Tile<scalar_t>& tile, const Layer<scalar_t>& layer, ConstStored<scalar_t> streams,
                    ConstStored<scalar_t> own, Matrix<scalar_t> alpha, Matrix<scalar_t> gate,
                    const StoredMatrix<scalar_t>& out, MutualScratch<scalar_t>& scratch) {
  const Trunk<scalar_t>& trunk = tile.trunk();
  const int64_t m = trunk.num_scenarios, d = layer.width;
  const std::vector<Segment> segments = tile.segments();
  gates(trunk.own_rounding(), tile, segments, own, 0, layer, gate, 0, scratch.team);
  const auto mutual_rows = [&](const auto& all, int64_t segment, int64_t worker) {
    const Segment s = segments[segment];
    scalar_t* mix = scratch.mixes + worker * scratch.width;
    double* cosine = scratch.cosines + worker * scratch.numbers;
    double* v_t = scratch.owns + worker * scratch.width;
    scalar_t *own_row = scratch.rows + 2 * worker * scratch.width, *out_row = own_row + scratch.width;
    for (int64_t r = s.rows.begin; r < s.rows.end; ++r) {
      const auto* v = all.row(r);
      constexpr bool rounded = std::is_same_v<decltype(v), const Bfloat16*>;
      const scalar_t* own_v = row_of(own, r, own_row);
      if constexpr (!rounded) {
        std::copy_n(own_v, d, v_t);
      }
      const double own_norm = clamped_norm(own_v, d);
      for (int64_t j = 0; j < m; ++j) {
        if (j == s.scenario) {
          cosine[j] = 0;
          continue;
        }
        const Dots<1> of = dots_with_own(v + j * d, own_v, v_t, d, all.ld);
        cosine[j] = of.with[0] / (own_norm * clamped_norm(of.squared));
      }
      score_weights(trunk, cosine, s.scenario, alpha.row(r));
      mix_streams(m, d, v, alpha.row(r), mix);
      scalar_t* mutual = place_of(out, r, out_row);
      add_gated(d, own_v, gate.row(r), layer.gate_width, mix, mutual);
      if (out.storage == Storage::kBfloat16) {
        write_bfloat16<scalar_t>({mutual, 1, d, d}, out.row_range(r, r + 1));
      }
    }
  };
  const bool shared = trunk.team.workers > 1 && tile.rows() * m * d >= kLeastSharedWork;
  with_saved_elements<scalar_t>(streams, [&](const auto& all) {
    share_items(shared ? trunk.team : Team{}, static_cast<int64_t>(segments.size()),
                [&](int64_t segment, int64_t worker) { mutual_rows(all, segment, worker); });
  });
}

// The whole table: M_i of every branch into out, the own one from own.
template <typename scalar_t>
void mutual_table(const Tile<scalar_t>& tile, const Layer<scalar_t>& layer, ConstMatrix<scalar_t> streams,
                  ConstMatrix<scalar_t> own, Matrix<scalar_t> out, MutualScratch<scalar_t>& scratch) {
  const Trunk<scalar_t>& trunk = tile.trunk();
  const int64_t m = trunk.num_scenarios, d = layer.width, width = layer.gate_width;
  const Matrix<scalar_t> gate = tile.in(scratch.gate, m * width);
  std::vector<Segment> branches;
  for (int64_t k = 0; k < m; ++k) {
    branches.push_back({k, tile.all()});
  }
  gates(trunk.foreign_rounding, tile, branches, streams, d, layer, gate, width, scratch.team);
  scalar_t* mix = scratch.mixes;
  double* cosine = scratch.cosines;
  double* norm = cosine + m * m;
  scalar_t* alpha = scratch.alpha;
  tile.for_each_segment([&](Segment s) {
    for (int64_t r = s.rows.begin; r < s.rows.end; ++r) {
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
        score_weights(trunk, cosine + i * m, i, alpha);
        mix_streams(m, d, v, alpha, mix);
        add_gated(d, v + i * d, gate.row(r) + i * width, width, mix, out.row(r) + i * d);
      }
    }
  });
}

template <typename scalar_t>
struct MutualBackwardScratch {
  scalar_t* mix;     // Σ_j α_j V_j of a row
  double* row;       // c, n, p and dc of a row
  double* own;       // V_t of a row
  double* scaled;    // G of a row
  double* d_cosine;  // the cosines' part of a row's gradient
  // Of what stands in 16 bits: V of a row, and g.
  scalar_t* streams;
  scalar_t* gate;
  ProductScratch<scalar_t>& product;

  MutualBackwardScratch(const Trunk<scalar_t>& trunk, const Widest<scalar_t>& widest,
                        ProductScratch<scalar_t>& products, Scratch<scalar_t>& scratch)
      : product(products) {
    mix = scratch.take(widest.stream);
    row = scratch.template take<double>(4 * trunk.num_scenarios);
    d_cosine = scratch.template take<double>(widest.stream);
    own = scratch.template take<double>(widest.stream);
    scaled = scratch.template take<double>(widest.stream);
    streams = scratch.take(trunk.own_bfloat16 ? trunk.num_scenarios * widest.stream : 0);
    gate = scratch.take(trunk.own_bfloat16 ? trunk.tile_rows() * widest.stream : 0);
  }
};

// A row as the mutual unit's backward reads and writes it.
template <typename scalar_t>
struct MutualRow {
  const scalar_t* streams;  // V_1 .. V_M
  const scalar_t* alpha;
  const scalar_t* gate;
  scalar_t* d_own;    // dM, which becomes dV_t but for dz_g U_tᵀ
  scalar_t* dz_gate;  // receives dz_g
};

// Backward of the own row t; foreign streams are constants. Sums run over j ≠ t, V̂_j = V_j / n_j, mix = Σ α_j V_j:
//
//     G    = dM ∘ g              dz_g = dM ∘ mix ∘ g ∘ (1 − g), of a scalar gate summed over d
//     p_j  = ⟨G, V_j⟩            p̄ = Σ α_j p_j
//     dc_j = r_j / S − Σ_k r_k c_k / S²,  r_j = α_j (p_j − p̄),  S = Σ c_j        ratio; 0 where |S| < 1e−6
//     dc_j = α_j (p_j − p̄) / τ                                                   softmax
//     dV_t = dM + dz_g U_tᵀ + (Σ_j dc_j V̂_j − [‖V_t‖ > ε] (Σ_j dc_j c_j / n_t) V_t) / n_t
template <typename scalar_t>
void mutual_backward_row(const Trunk<scalar_t>& trunk, const Layer<scalar_t>& layer, int64_t t,
                         const MutualRow<scalar_t>& row, MutualBackwardScratch<scalar_t>& scratch) {
  const auto [streams, alpha, gate, d_own, dz_gate] = row;
  const int64_t m = trunk.num_scenarios, d = layer.width;
  const scalar_t* own = streams + t * d;
  double* c = scratch.row;
  double* n = c + m;
  double* p = n + m;
  double* dc = p + m;
  double* scaled = scratch.scaled;

  mix_streams(m, d, streams, alpha, scratch.mix);
  const bool scalar_gate = layer.gate_width == 1;
  for (int64_t i = 0; i < d; ++i) {
    scaled[i] = d_own[i] * gate[scalar_gate ? 0 : i];
  }
  if (scalar_gate) {
    dz_gate[0] = static_cast<scalar_t>(dot(d_own, scratch.mix, d)) * gate[0] * (1 - gate[0]);
  } else {
    for (int64_t i = 0; i < d; ++i) {
      dz_gate[i] = d_own[i] * scratch.mix[i] * gate[i] * (1 - gate[i]);
    }
  }

  const double raw_norm = std::sqrt(dot(own, own, d));
  const double n_t = std::max(raw_norm, kNormEpsilon);
  std::copy_n(own, d, scratch.own);
  double sum_c = 0, mean_p = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (j == t) {
      continue;
    }
    const Dots<2> of = dots<2>(streams + j * d, {scratch.own, scaled}, d);
    n[j] = clamped_norm(of.squared);
    c[j] = of.with[0] / (n_t * n[j]);
    p[j] = of.with[1];
    sum_c += c[j];
    mean_p += alpha[j] * p[j];
  }
  const bool ratio = trunk.score == Score::kRatio;
  if (ratio && std::abs(sum_c) < kDegenerateSum) {
    return;
  }
  const double factor = ratio ? 1 / sum_c : 1 / trunk.temperature;
  double shared = 0;  // Σ_k r_k c_k / S²
  for (int64_t j = 0; j < m; ++j) {
    if (j != t) {
      dc[j] = alpha[j] * (p[j] - mean_p) * factor;
      shared += dc[j] * c[j];
    }
  }
  shared = ratio ? shared * factor : 0.0;
  // In double: a cosine has no slope along V_t, so that the terms cancel where V_j and V_t are nearly parallel.
  double* d_cosine = scratch.d_cosine;
  std::fill_n(d_cosine, d, 0.0);
  double along = 0;  // Σ_j dc_j c_j
  for (int64_t j = 0; j < m; ++j) {
    if (j == t) {
      continue;
    }
    dc[j] -= shared;
    along += dc[j] * c[j];
    const double weight = dc[j] / (n[j] * n_t);
    const scalar_t* v = streams + j * d;
    for (int64_t i = 0; i < d; ++i) {
      d_cosine[i] += weight * static_cast<double>(v[i]);
    }
  }
  const double weight = raw_norm > kNormEpsilon ? along / (n_t * n_t) : 0.0;
  for (int64_t i = 0; i < d; ++i) {
    d_own[i] += static_cast<scalar_t>(d_cosine[i] - weight * static_cast<double>(own[i]));
  }
}

// The same of a tile's rows, with dz_g U_tᵀ: dM becomes dV_t.
template <typename scalar_t>
void mutual_backward(const Tile<scalar_t>& tile, const Layer<scalar_t>& layer, const Saved<const scalar_t>& saved,
                     ConstStored<scalar_t> streams, Matrix<scalar_t> d_own, Matrix<scalar_t> dz_gate,
                     MutualBackwardScratch<scalar_t>& scratch) {
  const ConstMatrix<scalar_t> alpha = tile.of(saved.alpha), gate = rows_of(tile.of(saved.gate), scratch.gate);
  tile.for_each_segment([&](Segment s) {
    for (int64_t r = s.rows.begin; r < s.rows.end; ++r) {
      mutual_backward_row(
          tile.trunk(), layer, s.scenario,
          {row_of(streams, r, scratch.streams), alpha.row(r), gate.row(r), d_own.row(r), dz_gate.row(r)}, scratch);
    }
    linear_dgrad(tile.trunk().own_rounding(), s.rows, dz_gate, layer.gates, s.scenario, 0, d_own, true,
                 scratch.product);
  });
}
