// Numbers that stand in memory in 16 bits: widened to a float where they are read, rounded where they are written.
// Included once per capability, after vector.h.

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t Bits16 __attribute__((vector_size(SAML_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(SAML_VECTOR_BYTES)));

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// An exponent of a float16 is 112 less than a float's, of infinity and NaN 224. A subnormal one is what is left of
// 2^-14 plus it, which a float holds: no operand is a subnormal float, which a processor may be told to take for 0.
constexpr uint32_t kExponentBias = 112u << 23;
constexpr uint32_t kInfinity16 = 0x7c00u << 13;
constexpr uint32_t kLeastNormal16 = 0x0400u << 13;
constexpr uint32_t kLeastNormal = 113u << 23;

inline float widened(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float widened(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude < kLeastNormal16) {
    return float_of(bits_of(float_of(magnitude + kLeastNormal) - float_of(kLeastNormal)) | sign);
  }
  return float_of((magnitude + (magnitude >= kInfinity16 ? 2 : 1) * kExponentBias) | sign);
}

template <typename scalar_t>
inline scalar_t widened(scalar_t x) {
  return x;
}

inline Bits32 load_bits(const void* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Bits32);
}

inline vec<float> load_widened(const Bfloat16* p) { return (vec<float>)(load_bits(p) << 16); }

// From AVX2 on there is an instruction for it.
#if SAML_VECTOR_BYTES == 64
inline vec<float> load_widened(const Float16* p) {
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif SAML_VECTOR_BYTES == 32
inline vec<float> load_widened(const Float16* p) {
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
inline vec<float> load_widened(const Float16* p) {
  const Bits32 bits = load_bits(p);
  const Bits32 sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Bits32 infinite = (Bits32)(magnitude >= kInfinity16), subnormal = (Bits32)(magnitude < kLeastNormal16);
  const Bits32 normal = magnitude + kExponentBias + (infinite & kExponentBias);
  const Bits32 small = (Bits32)((vec<float>)(magnitude + kLeastNormal) - float_of(kLeastNormal));
  return (vec<float>)(sign | (subnormal & small) | (~subnormal & normal));
}
#endif

template <typename scalar_t>
inline vec<scalar_t> load_widened(const scalar_t* p) {
  return load(p);
}

template <typename scalar_t>
inline vec<scalar_t> load_widened(ProductPointer<scalar_t> p) {
  return load(p.own) * load(p.shared);
}

// To the nearest, of two as near ones to the even one.
inline Bfloat16 round_to(float x, Bfloat16) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding must not turn a NaN into an infinity.
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

inline Float16 round_to(float x, Float16) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  // The sum with 0.5 has the spacing of subnormal float16s, 2^-24; beyond 2^16 there are infinity and NaN.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - kExponentBias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u    ? large
                                        : magnitude >= kLeastNormal ? normal
                                                                    : small))};
}

// function(view), the view's elements being what they are stored as. Not of products, where there can be none.
template <typename scalar_t, typename Function>
inline void with_stored_elements(const StoredMatrix<const scalar_t>& matrix, const Function& function) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    const auto call = [&]<typename element_t>(element_t) {
      function(
          MatrixView<const element_t>{static_cast<const element_t*>(matrix.data), matrix.rows, matrix.cols, matrix.ld});
    };
    if (matrix.storage == Storage::kBfloat16) {
      call(Bfloat16());
      return;
    }
    if (matrix.storage == Storage::kFloat16) {
      call(Float16());
      return;
    }
  }
  function(matrix.view());
}

// The same of what a layer saves: as it is computed, or in bfloat16.
template <typename scalar_t, typename Function>
inline void with_saved_elements(const StoredMatrix<const scalar_t>& matrix, const Function& function) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (matrix.storage == Storage::kBfloat16) {
      const auto* data = static_cast<const Bfloat16*>(matrix.data);
      function(MatrixView<const Bfloat16>{data, matrix.rows, matrix.cols, matrix.ld});
      return;
    }
  }
  function(matrix.view());
}

// Of products too.
template <typename scalar_t, typename Function>
inline void with_elements(const StoredMatrix<const scalar_t>& matrix, const Function& function) {
  if (matrix.storage == Storage::kProduct) {
    const ProductPointer<scalar_t> first(matrix.view().data, matrix.shared);
    function(MatrixView<const Product<scalar_t>>{first, matrix.rows, matrix.cols, matrix.ld});
    return;
  }
  with_stored_elements<scalar_t>(matrix, function);
}

// source: a pointer to the values as they are stored.
template <typename pointer_t, typename scalar_t>
inline void widen_values(pointer_t source, int64_t count, scalar_t* target) {
  if constexpr (std::is_same_v<pointer_t, const scalar_t*>) {
    std::copy_n(source, count, target);
  } else {
    int64_t i = 0;
    for (; i + kLanes<scalar_t> <= count; i += kLanes<scalar_t>) {
      store(target + i, load_widened(source + i));
    }
    for (; i < count; ++i) {
      stay_scalar();
      target[i] = widened(source[i]);
    }
  }
}

// Asks for the lines of a row, to read or to write them.
template <bool write, typename scalar_t>
inline void ask_for_row(const StoredMatrix<const scalar_t>& matrix, int64_t row) {
  const char* first = static_cast<const char*>(matrix.at(row, 0));
  for (int64_t byte = 0; byte < matrix.cols * matrix.element_size(); byte += 64) {
    __builtin_prefetch(first + byte, write);
  }
}

// Columns begin .. begin + count of a row. Not inlined: every copy holds a loop of vectors for each type.
template <typename scalar_t>
__attribute__((noinline)) void read_row(ConstStored<scalar_t> matrix, int64_t row, int64_t begin, int64_t count,
                                        scalar_t* target) {
  with_elements<scalar_t>(matrix, [&](const auto& view) { widen_values(view.row(row) + begin, count, target); });
}

// The same to a row of another matrix, which is computed or stands as this one does.
template <typename scalar_t>
inline void copy_row(ConstStored<scalar_t> from, int64_t row, int64_t begin, int64_t count,
                     const StoredMatrix<scalar_t>& to, int64_t to_row) {
  if (to.storage == Storage::kComputed) {
    read_row(from, row, begin, count, to.view().row(to_row));
  } else {
    std::memcpy(to.at(to_row, 0), from.at(row, begin), static_cast<size_t>(count * to.element_size()));
  }
}

// The row where it stands, or in the buffer.
template <typename scalar_t>
inline const scalar_t* row_of(const StoredMatrix<const scalar_t>& matrix, int64_t row, scalar_t* buffer) {
  if (matrix.storage == Storage::kComputed) {
    return matrix.view().row(row);
  }
  read_row(matrix, row, 0, matrix.cols, buffer);
  return buffer;
}

// The matrix where it stands, or widened in the buffer.
template <typename scalar_t>
inline MatrixView<const scalar_t> rows_of(const StoredMatrix<const scalar_t>& matrix, scalar_t* buffer) {
  if (matrix.storage == Storage::kComputed) {
    return matrix.view();
  }
  for (int64_t r = 0; r < matrix.rows; ++r) {
    read_row(matrix, r, 0, matrix.cols, buffer + r * matrix.cols);
  }
  return {buffer, matrix.rows, matrix.cols, matrix.cols};
}

// A row, from columns begin on; nothing is done where the values stand there already. Not inlined either.
template <typename scalar_t>
__attribute__((noinline)) void write_row(const scalar_t* values, int64_t count, Stored<scalar_t> matrix, int64_t row,
                                         int64_t begin) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    const auto round = [&](auto kind) {
      auto* target = static_cast<decltype(kind)*>(matrix.at(row, begin));
      for (int64_t i = 0; i < count; ++i) {
        target[i] = round_to(values[i], kind);
      }
    };
    if (matrix.storage == Storage::kBfloat16) {
      round(Bfloat16());
      return;
    }
    if (matrix.storage == Storage::kFloat16) {
      round(Float16());
      return;
    }
  }
  scalar_t* target = matrix.view().row(row) + begin;
  if (target != values) {
    std::copy_n(values, count, target);
  }
}

// All its rows.
template <typename scalar_t>
inline void write_rows(ConstMatrix<scalar_t> values, const StoredMatrix<scalar_t>& matrix) {
  for (int64_t r = 0; r < matrix.rows; ++r) {
    write_row(values.row(r), matrix.cols, matrix, r, 0);
  }
}

// Where to write a row before write_row: where it stands, or the buffer.
template <typename scalar_t>
inline scalar_t* place_of(const StoredMatrix<scalar_t>& matrix, int64_t row, scalar_t* buffer) {
  return matrix.storage == Storage::kComputed ? matrix.view().row(row) : buffer;
}
