// Asks the processor, and for AMX the operating system, what the machine can run.

#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace saml_kernels {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// AMX state is large, so Linux wants a process to ask for it, once; threads and children inherit the answer.
bool amx_permitted() {
  constexpr long kRequestComponentPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestComponentPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool amx_permitted() { return false; }
#endif

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows these two.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
}
#endif

}  // namespace

const std::vector<const Capability*>& supported_capabilities() {
  static const std::vector<const Capability*> supported = [] {
    std::vector<const Capability*> result;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool int8_dot = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bfloat16_dot = int8_dot && __builtin_cpu_supports("avx512bf16");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (bfloat16_dot && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
        __builtin_cpu_supports("amx-int8") && amx_permitted()) {
      result.push_back(&kAmx);
    }
    if (bfloat16_dot) {
      result.push_back(&kAvx512Bf16);
    }
    if (int8_dot) {
      result.push_back(&kAvx512Vnni);
    }
    if (avx512) {
      result.push_back(&kAvx512);
    }
    if (avx2 && has_avx_vnni()) {
      result.push_back(&kAvx2Vnni);
    }
    if (avx2) {
      result.push_back(&kAvx2);
    }
#endif
    result.push_back(&kBaseline);
    return result;
  }();
  return supported;
}

}  // namespace saml_kernels
