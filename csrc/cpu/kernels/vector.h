// Vectors of one instruction set, and the functions of δ and of the gate. Included once per capability, inside its
// namespace, with SAML_VECTOR_BYTES set; the compiler's target is that capability's.

template <typename scalar_t>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(SAML_VECTOR_BYTES)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(SAML_VECTOR_BYTES)));
};
template <typename scalar_t>
using vec = typename vector_of<scalar_t>::type;

template <typename scalar_t>
constexpr int kLanes = SAML_VECTOR_BYTES / sizeof(scalar_t);

template <typename scalar_t>
inline vec<scalar_t> load(const scalar_t* p) {
  vec<scalar_t> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename scalar_t>
inline void store(scalar_t* p, vec<scalar_t> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <typename scalar_t>
inline scalar_t sum(vec<scalar_t> v) {
  scalar_t total = 0;
  for (int i = 0; i < kLanes<scalar_t>; ++i) {
    total += v[i];
  }
  return total;
}

inline vec<double> load_double(const double* p) { return load(p); }

inline vec<double> load_double(const float* p) {
  // Place by place: of __builtin_convertvector GCC makes two conversions of half a vector each.
  vec<double> v = {};
  for (int i = 0; i < kLanes<double>; ++i) {
    v[i] = p[i];
  }
  return v;
}

// In a loop over what is left after the last whole vector: vectorised, it would only make the library larger.
inline void stay_scalar() { asm volatile(""); }

// <a, b> over n elements, always in the same order, in double: the ratio c_ij / Σ c_ij divides by a sum that may be
// close to 0, and magnifies the rounding of what it is made of.
template <typename scalar_t>
inline double dot(const scalar_t* a, const scalar_t* b, int64_t n) {
  constexpr int lanes = kLanes<double>;
  vec<double> even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    even += load_double(a + i) * load_double(b + i);
    odd += load_double(a + i + lanes) * load_double(b + i + lanes);
  }
  double total = sum<double>(even + odd);
  for (; i < n; ++i) {
    total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  return total;
}

// ⟨v, v⟩ and the products of v with factors that are double already, in one pass over v.
template <int count>
struct Dots {
  double squared;
  double with[count];
};

template <int count, typename scalar_t>
inline Dots<count> dots(const scalar_t* v, const double* const (&factors)[count], int64_t n) {
  constexpr int lanes = kLanes<double>, chains = 2;
  vec<double> squared[chains] = {}, products[count][chains] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= n; i += chains * lanes) {
#pragma GCC unroll 2
    for (int chain = 0; chain < chains; ++chain) {
      const int64_t place = i + chain * lanes;
      const vec<double> x = load_double(v + place);
      squared[chain] += x * x;
#pragma GCC unroll 2
      for (int f = 0; f < count; ++f) {
        products[f][chain] += x * load_double(factors[f] + place);
      }
    }
  }
  Dots<count> found{sum<double>(squared[0] + squared[1]), {}};
  for (int f = 0; f < count; ++f) {
    found.with[f] = sum<double>(products[f][0] + products[f][1]);
  }
  for (; i < n; ++i) {
    stay_scalar();
    const double x = static_cast<double>(v[i]);
    found.squared += x * x;
    for (int f = 0; f < count; ++f) {
      found.with[f] += x * factors[f][i];
    }
  }
  return found;
}

inline float power_of_two(int32_t n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// Branch-free, so that loops over it vectorise. Error 2e-7 relative; 0 and infinity past what a float holds.
inline float exponential(float x) {
  x = x < -105.0f ? -105.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The integer n stands in the low mantissa bits of the shifted value. 2^n itself may lie outside a float's range
  // where its halves do not.
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t exponent = bits - 0x4b400000, half = exponent >> 1;
  return p * power_of_two(half) * power_of_two(exponent - half);
}

inline double exponential(double x) { return std::exp(x); }

template <typename scalar_t>
inline scalar_t sigmoid(scalar_t x) {
  return scalar_t(1) / (scalar_t(1) + exponential(-x));
}

inline float hyperbolic_tangent(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float t = exponential(-2.0f * magnitude);
  const float large = 1.0f - 2.0f * t / (1.0f + t);
  // Near 0 the difference above cancels; the Taylor series does not.
  const float s = x * x;
  float p = -1.4558343870e-3f;
  p = p * s + 3.5921280366e-3f;
  p = p * s - 8.8632355299e-3f;
  p = p * s + 2.1869488537e-2f;
  p = p * s - 5.3968253968e-2f;
  p = p * s + 1.3333333333e-1f;
  p = p * s - 3.3333333333e-1f;
  const float small = x + x * (s * p);
  return s < 0.25f ? small : x < 0 ? -large : large;
}

inline double hyperbolic_tangent(double x) { return std::tanh(x); }

template <typename scalar_t>
struct Gelu {
  // √(2/π) and the cubic coefficient of the tanh form.
  static constexpr scalar_t kScale = scalar_t(0.7978845608028654);
  static constexpr scalar_t kCubic = scalar_t(0.044715);

  static scalar_t value(scalar_t z) {
    return scalar_t(0.5) * z * (1 + hyperbolic_tangent(kScale * (z + kCubic * z * z * z)));
  }
  static scalar_t derivative(scalar_t z) {
    const scalar_t t = hyperbolic_tangent(kScale * (z + kCubic * z * z * z));
    return scalar_t(0.5) * (1 + t) + scalar_t(0.5) * z * (1 - t * t) * kScale * (1 + 3 * kCubic * z * z);
  }
};

// v = δ(z); z and v may be the same place.
template <typename scalar_t>
inline void activate(Activation activation, const scalar_t* z, scalar_t* v, int64_t n) {
  switch (activation) {
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) {
        // A NaN must survive, so the comparison decides what is zero.
        v[i] = z[i] <= 0 ? scalar_t(0) : z[i];
      }
      break;
    case Activation::kLeakyRelu:
      for (int64_t i = 0; i < n; ++i) {
        v[i] = z[i] > 0 ? z[i] : scalar_t(0.01) * z[i];
      }
      break;
    case Activation::kGelu:
      for (int64_t i = 0; i < n; ++i) {
        v[i] = Gelu<scalar_t>::value(z[i]);
      }
      break;
    case Activation::kSilu:
      for (int64_t i = 0; i < n; ++i) {
        v[i] = z[i] * sigmoid(z[i]);
      }
      break;
    case Activation::kTanh:
      for (int64_t i = 0; i < n; ++i) {
        v[i] = hyperbolic_tangent(z[i]);
      }
      break;
    case Activation::kIdentity:
      if (v != z) {
        std::copy_n(z, n, v);
      }
      break;
  }
}

// relu leaves no sum less than 0, which a product can see to before it stores them; for every other δ this is the least
// there is.
template <typename scalar_t>
inline scalar_t least_of(Activation activation) {
  return activation == Activation::kRelu ? scalar_t(0) : -std::numeric_limits<scalar_t>::infinity();
}

// dz = dv ∘ δ'(z), from v = δ(z), or from z where needs_preact(activation).
template <typename scalar_t>
inline void activate_backward(Activation activation, const scalar_t* v, const scalar_t* z, const scalar_t* dv,
                              scalar_t* dz, int64_t n) {
  switch (activation) {
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) {
        // As forward: where v is NaN the gradient is not lost.
        dz[i] = v[i] <= 0 ? scalar_t(0) : dv[i];
      }
      break;
    case Activation::kLeakyRelu:
      for (int64_t i = 0; i < n; ++i) {
        dz[i] = v[i] > 0 ? dv[i] : scalar_t(0.01) * dv[i];
      }
      break;
    case Activation::kGelu:
      for (int64_t i = 0; i < n; ++i) {
        dz[i] = dv[i] * Gelu<scalar_t>::derivative(z[i]);
      }
      break;
    case Activation::kSilu:
      for (int64_t i = 0; i < n; ++i) {
        const scalar_t s = sigmoid(z[i]);
        dz[i] = dv[i] * s * (1 + z[i] * (1 - s));
      }
      break;
    case Activation::kTanh:
      for (int64_t i = 0; i < n; ++i) {
        dz[i] = dv[i] * (1 - v[i] * v[i]);
      }
      break;
    case Activation::kIdentity:
      std::copy_n(dv, n, dz);
      break;
  }
}
