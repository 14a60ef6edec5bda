// The mutual unit of one row. Included once per capability, after linear.h.

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
template <typename scalar_t>
inline void mix_streams(int64_t m, int64_t d, const scalar_t* streams, const scalar_t* alpha, scalar_t* mix) {
  std::fill_n(mix, d, scalar_t(0));
  for (int64_t j = 0; j < m; ++j) {
    const scalar_t weight = alpha[j];
    if (weight == 0) {
      continue;
    }
    const scalar_t* v = streams + j * d;
    for (int64_t i = 0; i < d; ++i) {
      mix[i] += weight * v[i];
    }
  }
}

template <typename scalar_t>
inline double clamped_norm(const scalar_t* v, int64_t d) {
  return std::max(std::sqrt(dot(v, v, d)), kNormEpsilon);
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
