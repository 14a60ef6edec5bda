// What one instruction can do on this processor, in loops that nothing but it limits; and how fast memory is read.
//
// Every loop has more independent sums than the instruction has cycles of latency times issues a cycle, and operands
// that the compiler may not take for constant. Rates are of all threads together.

#include <cpuid.h>
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

constexpr int kSums = 12;
// Where a sum waits for an addition only.
constexpr int kPairSums = 4;

// A value in a register that the compiler knows nothing of.
#define OPAQUE(constraint, value) asm volatile("" : "+" constraint(value))

// Vectors x and y multiplied and added to each of so many sums. Sums that began alike would be computed once, and so
// would products of an x that stays the same.
#define LOOP(name, target_, vector, constraint, count, x_, y_, added) \
  __attribute__((target(target_))) void name(std::int64_t repeats) {  \
    vector sums[count] = {}, x = x_, y = y_;                          \
    for (auto& sum : sums) OPAQUE(constraint, sum);                   \
    for (std::int64_t i = 0; i < repeats; ++i) {                      \
      _Pragma("GCC unroll 12") for (auto& sum : sums) {               \
        OPAQUE(constraint, x);                                        \
        sum = added;                                                  \
      }                                                               \
    }                                                                 \
    for (auto& sum : sums) OPAQUE(constraint, sum);                   \
  }

LOOP(float32_baseline, "sse2", __m128, "x", kSums, _mm_set1_ps(0.5f), _mm_set1_ps(0.25f),
     _mm_add_ps(sum, _mm_mul_ps(x, y)))
LOOP(float32_avx2, "avx2,fma", __m256, "x", kSums, _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f),
     _mm256_fmadd_ps(x, y, sum))
LOOP(float32_avx512, "avx512f", __m512, "v", kSums, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f),
     _mm512_fmadd_ps(x, y, sum))
LOOP(int8_avx2, "avx2", __m256i, "x", kPairSums, _mm256_set1_epi16(3), _mm256_set1_epi16(5),
     _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)))
LOOP(int8_avx512, "avx512f,avx512bw", __m512i, "v", kPairSums, _mm512_set1_epi16(3), _mm512_set1_epi16(5),
     _mm512_add_epi32(sum, _mm512_madd_epi16(x, y)))
LOOP(int8_avx2_vnni, "avx2,avxvnni", __m256i, "x", kSums, _mm256_set1_epi8(3), _mm256_set1_epi8(5),
     _mm256_dpbusd_avx_epi32(sum, x, y))
LOOP(int8_avx512_vnni, "avx512f,avx512vnni", __m512i, "v", kSums, _mm512_set1_epi8(3), _mm512_set1_epi8(5),
     _mm512_dpbusd_epi32(sum, x, y))
LOOP(bfloat16_avx512, "avx512f,avx512bf16", __m512, "v", kSums, (__m512)_mm512_set1_epi16(0x3f00),
     (__m512)_mm512_set1_epi16(0x3e80), _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y))

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
  if (is("avx512_vnni")) return __builtin_cpu_supports("avx512vnni");
  if (is("bf16")) return __builtin_cpu_supports("avx512bf16");
  // The compiler's function knows these only from later versions on.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (is("avx2_vnni")) {
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
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
    {"int8 avx2_vnni", "avx2_vnni", int8_avx2_vnni, kSums * 32 * 2},
    {"int8 avx512_vnni", "avx512_vnni", int8_avx512_vnni, kSums * 64 * 2},
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
