// Tensors that a call makes and writes as a whole.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saml_kernels {

// Asks for the large pages that lie within a block of that size as a whole: the first touch of a page costs more than
// writing it, and that of a large one hardly more than that of a small one. Nothing outside the block is asked for, so
// one that is written as a whole takes no more memory. Where the system has no large pages, or decides otherwise,
// nothing changes.
inline void ask_for_large_pages([[maybe_unused]] void* block, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t(1) << 21;
  const uintptr_t first = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (first + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// Not initialised. Smaller blocks are taken out of what the allocator has kept, which has been touched before.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr int64_t kLeastBytes = int64_t(1) << 22;
  at::Tensor tensor = at::empty(sizes, options);
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  if (bytes >= kLeastBytes) {
    ask_for_large_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

}  // namespace saml_kernels
