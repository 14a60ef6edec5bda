// AVX-512, dot products of bfloat16 and int8, and AMX, in plain C++ as Intel's Software Developer's Manual defines
// them: the kernels for these instruction sets run on any x86-64 machine with AVX2, and a sanitizer sees what they
// read, also through tiles. Stands for <immintrin.h>. Only what the kernels use is here; another intrinsic stops the
// build, because the compiler may not use these instruction sets there.
//
// Bfloat16 products take denormals as 0 and make none, and an addition rounds to even once. Undefined behaviour ends
// the process: a tile that is not set up, loads and stores that are not aligned where they should be.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

// AVX2 alone needs nothing of this.
#if SAML_VECTOR_BYTES == 64 || SAML_HAS_INT8_DOT
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace saml_kernels::emulated {

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "emulated instruction: %s\n", what);
  std::abort();
}

// Lanes of a register of as many bytes.
template <typename lane_t, typename register_t>
struct Lanes {
  static constexpr int kCount = sizeof(register_t) / sizeof(lane_t);
  lane_t lane[kCount];

  // Without addresses: ThreadSanitizer watches all that has one.
  Lanes() : lane{} {}
  explicit Lanes(const register_t& value) { *this = std::bit_cast<Lanes>(value); }
  register_t value() const { return std::bit_cast<register_t>(*this); }
};

using Floats = Lanes<float, __m512>;
using Words = Lanes<uint32_t, __m512i>;
using Quads = Lanes<uint64_t, __m512i>;
using Halves = Lanes<uint16_t, __m512i>;

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline bool is_denormal(uint32_t bits) { return (bits & 0x7f800000u) == 0; }

inline float flushed(float x) {
  const uint32_t bits = as_bits(x);
  return is_denormal(bits) ? as_float(bits & 0x80000000u) : x;
}

inline float widened(uint16_t bfloat16) { return flushed(as_float(static_cast<uint32_t>(bfloat16) << 16)); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) {
    return static_cast<uint16_t>(bits >> 16 | 0x40u);
  }
  if (is_denormal(bits)) {
    return static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// sum + a b, rounded once.
inline float fused(float sum, uint16_t a, uint16_t b) {
  return flushed(__builtin_fmaf(widened(a), widened(b), flushed(sum)));
}

inline __m512 loadu_ps(const void* p) {
  __m512 result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline __m512 load_ps(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(__m512) != 0) {
    fault("an aligned load from an address that is not");
  }
  return loadu_ps(p);
}

inline __m512i loadu_si512(const void* p) {
  __m512i result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline void stream_ps(void* p, __m512 value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(__m512) != 0) {
    fault("a store past the caches to an address that is not aligned");
  }
  std::memcpy(p, &value, sizeof(value));
}

inline void storeu_si512(void* p, __m512i value) { std::memcpy(p, &value, sizeof(value)); }

inline __m512 setzero_ps() { return Floats().value(); }

inline __m512i set1_epi32(int value) {
  Words result;
  for (uint32_t& lane : result.lane) {
    lane = static_cast<uint32_t>(value);
  }
  return result.value();
}

inline __m512 castsi512_ps(__m512i value) { return loadu_ps(&value); }

inline __m512 maskz_loadu_ps(__mmask16 mask, const void* from) {
  Floats result;
  for (int i = 0; i < Floats::kCount; ++i) {
    if ((mask >> i & 1) != 0) {
      std::memcpy(&result.lane[i], static_cast<const char*>(from) + 4 * i, 4);
    }
  }
  return result.value();
}

inline __m256i maskz_loadu_epi16(__mmask16 mask, const void* from) {
  __m256i result = _mm256_setzero_si256();
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) {
      std::memcpy(reinterpret_cast<char*>(&result) + 2 * i, static_cast<const char*>(from) + 2 * i, 2);
    }
  }
  return result;
}

inline void mask_storeu_epi32(void* to, __mmask16 mask, __m512i value) {
  const Words source(value);
  for (int i = 0; i < Words::kCount; ++i) {
    if ((mask >> i & 1) != 0) {
      std::memcpy(static_cast<char*>(to) + 4 * i, &source.lane[i], 4);
    }
  }
}

template <typename lanes_t, typename register_t, typename function_t>
inline register_t each(const register_t& a, const register_t& b, const function_t& function) {
  const lanes_t left(a), right(b);
  lanes_t result;
  for (int i = 0; i < lanes_t::kCount; ++i) {
    result.lane[i] = function(left.lane[i], right.lane[i]);
  }
  return result.value();
}

inline __m512 sub_ps(__m512 a, __m512 b) {
  return each<Floats>(a, b, [](float x, float y) { return x - y; });
}

inline __m512i or_si512(__m512i a, __m512i b) {
  return each<Words>(a, b, [](uint32_t x, uint32_t y) { return x | y; });
}

inline __m512i add_epi32(__m512i a, __m512i b) {
  return each<Words>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}

inline __m512i slli_epi32(__m512i a, unsigned count) {
  return each<Words>(a, a, [count](uint32_t x, uint32_t) { return count < 32 ? x << count : 0; });
}

inline __m512i cvtepu16_epi32(__m256i a) {
  const Lanes<uint16_t, __m256i> source(a);
  Words result;
  for (int i = 0; i < Words::kCount; ++i) {
    result.lane[i] = source.lane[i];
  }
  return result.value();
}

// Of every 128 bits of a and b the low, or high, halves, lane by lane.
template <typename lanes_t>
inline __m512i interleaved(__m512i a, __m512i b, bool high) {
  constexpr int kGroup = 16 / sizeof(lanes_t().lane[0]);
  const lanes_t left(a), right(b);
  lanes_t result;
  for (int i = 0; i < lanes_t::kCount; ++i) {
    const int from = i / kGroup * kGroup + (high ? kGroup / 2 : 0) + i % kGroup / 2;
    result.lane[i] = i % 2 == 0 ? left.lane[from] : right.lane[from];
  }
  return result.value();
}

inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return interleaved<Words>(a, b, false); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return interleaved<Words>(a, b, true); }
inline __m512i unpacklo_epi64(__m512i a, __m512i b) { return interleaved<Quads>(a, b, false); }
inline __m512i unpackhi_epi64(__m512i a, __m512i b) { return interleaved<Quads>(a, b, true); }

inline __m512i shuffle_i32x4(__m512i a, __m512i b, int order) {
  const Words left(a), right(b);
  Words result;
  for (int group = 0; group < 4; ++group) {
    const int from = order >> (2 * group) & 3;
    std::memcpy(result.lane + 4 * group, (group < 2 ? left : right).lane + 4 * from, 16);
  }
  return result.value();
}

inline __m512i madd_epi16(__m512i a, __m512i b) {
  const Halves left(a), right(b);
  Words result;
  for (int i = 0; i < Words::kCount; ++i) {
    int64_t sum = 0;
    for (int j = 2 * i; j < 2 * i + 2; ++j) {
      sum += static_cast<int16_t>(left.lane[j]) * static_cast<int16_t>(right.lane[j]);
    }
    result.lane[i] = static_cast<uint32_t>(sum);
  }
  return result.value();
}

// Four unsigned bytes of a by four signed ones of b.
inline uint32_t byte_products(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    sum += static_cast<uint8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  }
  return static_cast<uint32_t>(sum);
}

inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  return add_epi32(sum, each<Words>(a, b, [](uint32_t x, uint32_t y) { return byte_products(x, y); }));
}

inline __m256i dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  using NarrowWords = Lanes<uint32_t, __m256i>;
  const auto products = each<NarrowWords>(a, b, [](uint32_t x, uint32_t y) { return byte_products(x, y); });
  return _mm256_add_epi32(sum, products);
}

inline __m512 cvtph_ps(__m256i a) {
  __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return loadu_ps(parts);
}

inline __m256bh cvtneps_pbh(__m512 a) {
  const Floats source(a);
  Lanes<uint16_t, __m256bh> result;
  for (int i = 0; i < Floats::kCount; ++i) {
    result.lane[i] = to_bfloat16(source.lane[i]);
  }
  return result.value();
}

inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Lanes<uint16_t, __m512bh> left(a), right(b);
  Floats result(sum);
  for (int i = 0; i < Floats::kCount; ++i) {
    for (int j = 2 * i + 1; j >= 2 * i; --j) {
      result.lane[i] = fused(result.lane[i], left.lane[j], right.lane[j]);
    }
  }
  return result.value();
}

struct Tile {
  static constexpr int kMostRows = 16, kMostBytes = 64;
  uint32_t unit[kMostRows][kMostBytes / 4] = {};
};

// A thread's tile registers.
struct Tiles {
  static constexpr int kCount = 8;
  bool is_set_up = false;
  int rows[kCount] = {}, row_bytes[kCount] = {};
  Tile tile[kCount] = {};
};

inline thread_local Tiles tiles;

inline void tile_loadconfig(const void* memory) {
  unsigned char config[64];
  std::memcpy(config, memory, sizeof(config));
  if (config[0] != 1) {
    fault("tiles of another palette than 1");
  }
  for (int i = 1; i < 64; ++i) {
    // Start row, what is reserved, and registers that do not exist.
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && config[i] != 0) {
      fault("a byte of the tiles' configuration that must be 0");
    }
  }
  tiles = Tiles();
  tiles.is_set_up = true;
  for (int i = 0; i < Tiles::kCount; ++i) {
    tiles.row_bytes[i] = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    tiles.rows[i] = config[48 + i];
    if (tiles.rows[i] > Tile::kMostRows || tiles.row_bytes[i] > Tile::kMostBytes || tiles.row_bytes[i] % 4 != 0 ||
        (tiles.rows[i] == 0) != (tiles.row_bytes[i] == 0)) {
      fault("a tile of another size than a register has");
    }
  }
}

inline void tile_release() { tiles = Tiles(); }

inline void require_tile(int tile) {
  if (!tiles.is_set_up || tiles.rows[tile] == 0) {
    fault("a tile that is not set up");
  }
}

inline void tile_zero(int tile) {
  require_tile(tile);
  tiles.tile[tile] = Tile();
}

inline void tile_loadd(int tile, const void* base, int64_t stride) {
  tile_zero(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(tiles.tile[tile].unit[r], static_cast<const char*>(base) + r * stride, tiles.row_bytes[tile]);
  }
}

inline void tile_stored(int tile, void* base, int64_t stride) {
  require_tile(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tiles.tile[tile].unit[r], tiles.row_bytes[tile]);
  }
}

// The shapes of sums += a b.
inline void require_product(int sums, int a, int b) {
  for (int tile : {sums, a, b}) {
    require_tile(tile);
  }
  if (sums == a || sums == b || a == b || tiles.rows[sums] != tiles.rows[a] ||
      tiles.row_bytes[sums] != tiles.row_bytes[b] || tiles.row_bytes[a] != 4 * tiles.rows[b]) {
    fault("a product of tiles that do not fit");
  }
}

// Of what the registers hold, in products.cpp: no sanitizer watches these.
void multiply_bfloat16(const Tile& left, const Tile& right, int rows, int depth, int columns, Tile& out);
void multiply_bytes(const Tile& left, const Tile& right, int rows, int depth, int columns, Tile& out);

template <typename function_t>
inline void tile_product(int sums, int a, int b, const function_t& multiply) {
  require_product(sums, a, b);
  multiply(tiles.tile[a], tiles.tile[b], tiles.rows[sums], tiles.rows[b], tiles.row_bytes[sums] / 4, tiles.tile[sums]);
}

inline void tile_dpbf16ps(int sums, int a, int b) { tile_product(sums, a, b, multiply_bfloat16); }
inline void tile_dpbusd(int sums, int a, int b) { tile_product(sums, a, b, multiply_bytes); }

}  // namespace saml_kernels::emulated

#pragma GCC pop_options

// The compiler's own are macros or functions of these names.
#undef _mm512_shuffle_i32x4
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#define _mm256_dpbusd_avx_epi32 saml_kernels::emulated::dpbusd_avx_epi32
#define _mm256_maskz_loadu_epi16 saml_kernels::emulated::maskz_loadu_epi16
#define _mm512_castsi512_ps saml_kernels::emulated::castsi512_ps
#define _mm512_cvtepu16_epi32 saml_kernels::emulated::cvtepu16_epi32
#define _mm512_cvtneps_pbh saml_kernels::emulated::cvtneps_pbh
#define _mm512_cvtph_ps saml_kernels::emulated::cvtph_ps
#define _mm512_dpbf16_ps saml_kernels::emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 saml_kernels::emulated::dpbusd_epi32
#define _mm512_load_ps saml_kernels::emulated::load_ps
#define _mm512_loadu_si512 saml_kernels::emulated::loadu_si512
#define _mm512_madd_epi16 saml_kernels::emulated::madd_epi16
#define _mm512_mask_storeu_epi32 saml_kernels::emulated::mask_storeu_epi32
#define _mm512_maskz_loadu_ps saml_kernels::emulated::maskz_loadu_ps
#define _mm512_or_si512 saml_kernels::emulated::or_si512
#define _mm512_set1_epi32 saml_kernels::emulated::set1_epi32
#define _mm512_setzero_ps saml_kernels::emulated::setzero_ps
#define _mm512_shuffle_i32x4 saml_kernels::emulated::shuffle_i32x4
#define _mm512_slli_epi32 saml_kernels::emulated::slli_epi32
#define _mm512_storeu_si512 saml_kernels::emulated::storeu_si512
#define _mm512_stream_ps saml_kernels::emulated::stream_ps
#define _mm512_sub_ps saml_kernels::emulated::sub_ps
#define _mm512_unpackhi_epi32 saml_kernels::emulated::unpackhi_epi32
#define _mm512_unpackhi_epi64 saml_kernels::emulated::unpackhi_epi64
#define _mm512_unpacklo_epi32 saml_kernels::emulated::unpacklo_epi32
#define _mm512_unpacklo_epi64 saml_kernels::emulated::unpacklo_epi64
#define _tile_dpbf16ps saml_kernels::emulated::tile_dpbf16ps
#define _tile_dpbusd saml_kernels::emulated::tile_dpbusd
#define _tile_loadconfig saml_kernels::emulated::tile_loadconfig
#define _tile_loadd saml_kernels::emulated::tile_loadd
#define _tile_release saml_kernels::emulated::tile_release
#define _tile_stored saml_kernels::emulated::tile_stored
#define _tile_zero saml_kernels::emulated::tile_zero
#endif
