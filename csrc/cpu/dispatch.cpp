// Asks the processor, and for AMX the operating system, what the machine can run.

#include "dispatch.h"

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

}  // namespace

const std::vector<const Capability*>& supported_capabilities() {
  static const std::vector<const Capability*> supported = [] {
    std::vector<const Capability*> result;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bfloat16_dot = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (bfloat16_dot && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && amx_permitted()) {
      result.push_back(&kAmx);
    }
    if (bfloat16_dot) {
      result.push_back(&kAvx512Bf16);
    }
    if (avx512) {
      result.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      result.push_back(&kAvx2);
    }
#endif
    result.push_back(&kBaseline);
    return result;
  }();
  return supported;
}

}  // namespace saml_kernels
