// What one instruction can do on this processor, in loops that nothing but it limits; and how fast memory is read.
//
// Every loop has more independent sums than the instruction has cycles of latency times issues a cycle, and operands
// that the compiler may not take for constant. Rates are of all threads together.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Loop = void (*)(std::int64_t repeats);

// A value in a register that the compiler knows nothing of.
#define OPAQUE(constraint, value) asm volatile("" : "+" constraint(value))
// Sums that began alike would be computed once.
#define UNLIKE(constraint, sums) \
  for (auto& sum : sums) OPAQUE(constraint, sum)

constexpr int kSums = 12;
// Where a sum waits for an addition only.
constexpr int kPairSums = 4;

void float32_baseline(std::int64_t repeats) {
  __m128 sums[kSums] = {};
  UNLIKE("x", sums);
  __m128 x = _mm_set1_ps(0.5f), y = _mm_set1_ps(0.25f);
  for (std::int64_t i = 0; i < repeats; ++i) {
    OPAQUE("x", x);
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm_add_ps(sum, _mm_mul_ps(x, y));
  }
  UNLIKE("x", sums);
}

__attribute__((target("avx2,fma"))) void float32_avx2(std::int64_t repeats) {
  __m256 sums[kSums] = {};
  UNLIKE("x", sums);
  __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
  for (std::int64_t i = 0; i < repeats; ++i) {
    OPAQUE("x", x);
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm256_fmadd_ps(x, y, sum);
  }
  UNLIKE("x", sums);
}

__attribute__((target("avx512f"))) void float32_avx512(std::int64_t repeats) {
  __m512 sums[kSums] = {};
  UNLIKE("v", sums);
  __m512 x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
  for (std::int64_t i = 0; i < repeats; ++i) {
    OPAQUE("v", x);
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm512_fmadd_ps(x, y, sum);
  }
  UNLIKE("v", sums);
}

__attribute__((target("avx2"))) void int8_avx2(std::int64_t repeats) {
  __m256i sums[kPairSums] = {};
  UNLIKE("x", sums);
  __m256i x = _mm256_set1_epi16(3), y = _mm256_set1_epi16(5);
  for (std::int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 4
    for (auto& sum : sums) {
      OPAQUE("x", x);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
    }
  }
  UNLIKE("x", sums);
}

__attribute__((target("avx512f,avx512bw"))) void int8_avx512(std::int64_t repeats) {
  __m512i sums[kPairSums] = {};
  UNLIKE("v", sums);
  __m512i x = _mm512_set1_epi16(3), y = _mm512_set1_epi16(5);
  for (std::int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 4
    for (auto& sum : sums) {
      OPAQUE("v", x);
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, y));
    }
  }
  UNLIKE("v", sums);
}

__attribute__((target("avx512f,avx512vnni"))) void int8_vnni(std::int64_t repeats) {
  __m512i sums[kSums] = {};
  UNLIKE("v", sums);
  __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
  for (std::int64_t i = 0; i < repeats; ++i) {
    OPAQUE("v", x);
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, x, y);
  }
  UNLIKE("v", sums);
}

__attribute__((target("avx512f,avx512bf16"))) void bfloat16_avx512(std::int64_t repeats) {
  __m512 sums[kSums] = {};
  UNLIKE("v", sums);
  __m512i x = _mm512_set1_epi16(0x3f00), y = _mm512_set1_epi16(0x3e80);
  for (std::int64_t i = 0; i < repeats; ++i) {
    OPAQUE("v", x);
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
  }
  UNLIKE("v", sums);
}

struct TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t unused[15] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};
};

__attribute__((target("amx-tile"))) void begin_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 6; ++tile) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = 16;
  }
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

__attribute__((target("amx-tile,amx-bf16"))) void bfloat16_amx(std::int64_t repeats) {
  begin_tiles();
  for (std::int64_t i = 0; i < repeats; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-int8"))) void int8_amx(std::int64_t repeats) {
  begin_tiles();
  for (std::int64_t i = 0; i < repeats; ++i) {
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 5);
    _tile_dpbssd(2, 4, 5);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_release();
}

bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has(const char* feature) {
  __builtin_cpu_init();
  const auto is = [&](const char* name) { return std::strcmp(feature, name) == 0; };
  if (is("sse2")) return true;
  if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (is("avx512")) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (is("vnni")) return __builtin_cpu_supports("avx512vnni");
  if (is("bf16")) return __builtin_cpu_supports("avx512bf16");
  // The compiler's function knows AMX only from later versions on.
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
  return tile && (is("amx-bf16") ? bf16 : int8) && tiles_allowed();
}

struct Rate {
  const char* name;
  const char* feature;
  Loop loop;
  double operations;  // of one repeat
};

constexpr double kTile = 16 * 16 * 2;

const Rate kRates[] = {
    {"float32 baseline", "sse2", float32_baseline, kSums * 4 * 2},
    {"float32 avx2", "avx2", float32_avx2, kSums * 8 * 2},
    {"float32 avx512", "avx512", float32_avx512, kSums * 16 * 2},
    {"int8 avx2", "avx2", int8_avx2, kPairSums * 16 * 2},
    {"int8 avx512", "avx512", int8_avx512, kPairSums * 32 * 2},
    {"int8 avx512_vnni", "vnni", int8_vnni, kSums * 64 * 2},
    {"bfloat16 avx512_bf16", "bf16", bfloat16_avx512, kSums * 32 * 2},
    {"bfloat16 amx", "amx-bf16", bfloat16_amx, 4 * kTile * 32},
    {"int8 amx", "amx-int8", int8_amx, 4 * kTile * 64},
};

// Work units a second of so many threads that all begin at once; `work` does one and returns how many it was.
template <typename Work>
double rate(int threads, double seconds, Work work) {
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  const auto run = [&](int thread) {
    work(thread);
    --waiting;
    while (waiting.load() > 0) {
    }
    double done = 0, passed = 0;
    const auto start = Clock::now();
    do {
      done += work(thread);
      passed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (passed < seconds);
    rates[thread] = done / passed;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (auto& other : others) other.join();
  double sum = 0;
  for (const double each : rates) sum += each;
  return sum;
}

}  // namespace

extern "C" {

int rates() { return sizeof(kRates) / sizeof(kRates[0]); }

const char* name_of(int index) { return kRates[index].name; }

bool is_supported(int index) { return has(kRates[index].feature); }

// Operations a second; a multiplication and an addition are two.
double operations_a_second(int index, int threads, double seconds) {
  constexpr std::int64_t kRepeats = 20'000;
  return rate(threads, seconds, [index](int) {
    kRates[index].loop(kRepeats);
    return kRepeats * kRates[index].operations;
  });
}

// Bytes a second of reading `bytes` in order, again and again, a part of them a thread.
double bytes_a_second(std::int64_t bytes, int threads, double seconds) {
  std::vector<std::int64_t> memory(bytes / 8, 1);
  const auto count = static_cast<std::int64_t>(memory.size()) / threads / 16 * 16;
  return rate(threads, seconds, [&](int thread) {
    const std::int64_t* values = memory.data() + thread * count;
    __m128i sums[8] = {};
    for (std::int64_t i = 0; i < count; i += 16)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        sums[j] = _mm_xor_si128(sums[j], _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i) + j));
    for (auto& sum : sums) OPAQUE("x", sum);
    return static_cast<double>(count) * 8;
  });
}

}  // extern "C"
