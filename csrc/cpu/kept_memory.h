// Memory of what calls make and write as a whole. Where large blocks are given back their pages are kept for calls to
// come: the first touch of a page takes the system longer than the processor takes to fill it, and a training step
// needs as much as the one before it.
//
// Pages kept and pages in use are together never more than were once in use, so that keeping does not raise the most
// that is needed here; and what no call has used for a while goes back to the system. The system is asked for pages of
// 2 MiB, as rows of a call's matrices stand further apart than ordinary pages are long, and a core remembers the places
// of so many pages only.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace saml_kernels {

class KeptMemory final : public c10::Allocator {
 public:
  // Smaller blocks come out of what torch's allocator keeps by itself.
  static constexpr size_t kLeastBytes = size_t{1} << 20;

  static KeptMemory& instance() {
    // Never destroyed: tensors may outlive every other object of the process.
    static KeptMemory* const memory = new KeptMemory;
    return *memory;
  }

  // Of a tensor. From torch's allocator where the block is small, nothing is to be kept, or the system reserves no
  // addresses.
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr block = block_of<true>(bytes);
    return block ? std::move(block) : c10::GetCPUAllocator()->allocate(bytes);
  }

  // Of a thread while it computes; torch's profiler counts tensors.
  c10::DataPtr scratch(size_t bytes) {
    c10::DataPtr block = block_of<false>(bytes);
    if (!block) {
      void* const data = c10::alloc_cpu(bytes);
      block = {data, data, &c10::free_cpu, c10::Device(c10::kCPU)};
    }
    return block;
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  // Gives the pages that are kept back to the system; their bytes.
  int64_t release() {
    const std::lock_guard lock(mutex_);
    const size_t bytes = kept_ * kChunkBytes;
    most_used_ = used_;
    drop_excess();
    return static_cast<int64_t>(bytes);
  }

 private:
  static constexpr size_t kChunkBytes = size_t{1} << 18;
  static constexpr size_t kLargePageBytes = size_t{1} << 21;
  static constexpr uint64_t kIdleRequests = 1024;

  struct Chunk {
    enum class State : uint8_t { kUntouched, kKept, kUsed };
    State state = State::kUntouched;
    size_t block_bytes = 0;     // of the block that begins here
    uint64_t last_request = 0;  // while it was used
  };
  using State = Chunk::State;

  KeptMemory() {
#if defined(__linux__)
    // Addresses alone cost nothing; as many as there is memory are never too few.
    const size_t bytes = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const reserved =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved != MAP_FAILED) {
      const size_t before = (0 - reinterpret_cast<uintptr_t>(reserved)) % kLargePageBytes;
      first_ = static_cast<char*>(reserved) + before;
      most_chunks_ = (bytes - before) / kChunkBytes;
      // Refused where the system has none; pages of 4 KiB serve as well, more slowly.
      madvise(first_, most_chunks_ * kChunkBytes, MADV_HUGEPAGE);
    }
    // Another thread may hold the lock while this one forks, and is not there in the child to release it.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  // The environment variable is read at every request, so that one process can test both.
  static bool keeps() {
    const char* const wanted = std::getenv("SAML_KERNELS_KEEP_MEMORY");
    const std::string_view word = wanted == nullptr || *wanted == '\0' ? "1" : wanted;
    TORCH_CHECK_VALUE(word == "0" || word == "1", "SAML_KERNELS_KEEP_MEMORY must be 0 or 1, got ", word);
    return word == "1";
  }

  static size_t chunks_of(size_t bytes) { return (bytes + kChunkBytes - 1) / kChunkBytes; }

  // Null where it is to come from elsewhere.
  template <bool reported>
  c10::DataPtr block_of(size_t bytes) {
    if (bytes < kLeastBytes || !keeps()) {
      return {};
    }
    const std::lock_guard lock(mutex_);
    void* const data = take(bytes);
    if (data == nullptr) {
      return {};
    }
    if constexpr (reported) {
      report(data, static_cast<int64_t>(bytes));
    }
    return {data, data, &give_back<reported>, c10::Device(c10::kCPU)};
  }

  // To torch's profiler.
  void report(void* block, int64_t bytes) const {
    c10::reportMemoryUsageToProfiler(block, bytes, used_ * kChunkBytes, (used_ + kept_) * kChunkBytes,
                                     c10::Device(c10::kCPU));
  }

  // Null where there is no room.
  void* take(size_t bytes) {
    const size_t count = chunks_of(bytes);
    if (++requests_ % kIdleRequests == 0) {
      drop_idle();
    }
    const size_t begin = first_fit(count);
    if (begin + count > most_chunks_) {
      return nullptr;
    }
    chunks_.resize(std::max(chunks_.size(), begin + count));
    for (size_t i = begin; i < begin + count; ++i) {
      kept_ -= chunks_[i].state == State::kKept;
      chunks_[i].state = State::kUsed;
    }
    chunks_[begin].block_bytes = bytes;
    used_ += count;
    most_used_ = std::max(most_used_, used_);
    drop_excess();
    char* const block = first_ + begin * kChunkBytes;
    forbid(block, count);
    allow(block, bytes);
    return block;
  }

  // What is kept may not be touched, nor what lies behind a block.
  static void forbid([[maybe_unused]] void* begin, [[maybe_unused]] size_t count) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(begin, count * kChunkBytes);
#endif
  }

  static void allow([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
#endif
  }

  // Lowest addresses first: so the pages that are kept are used again, and blocks of other sizes too.
  size_t first_fit(size_t count) const {
    size_t free = 0;
    for (size_t i = 0; i < chunks_.size() && free < count; ++i) {
      free = chunks_[i].state == State::kUsed ? 0 : free + 1;
      if (free == count) {
        return i + 1 - count;
      }
    }
    return chunks_.size() - free;
  }

  template <bool reported>
  static void give_back(void* block) {
    KeptMemory& memory = instance();
    const std::lock_guard lock(memory.mutex_);
    const auto begin = static_cast<size_t>(static_cast<char*>(block) - memory.first_) / kChunkBytes;
    const size_t bytes = memory.chunks_[begin].block_bytes, count = chunks_of(bytes);
    for (size_t i = begin; i < begin + count; ++i) {
      memory.chunks_[i].state = State::kKept;
      memory.chunks_[i].last_request = memory.requests_;
    }
    forbid(block, count);
    memory.used_ -= count;
    memory.kept_ += count;
    if constexpr (reported) {
      memory.report(block, -static_cast<int64_t>(bytes));
    }
  }

  // From the highest addresses on, where the next blocks come to stand last.
  void drop_excess() {
    for (size_t i = chunks_.size(); i > 0 && used_ + kept_ > most_used_; --i) {
      drop_if_kept(i - 1);
    }
  }

  void drop_idle() {
    for (size_t i = 0; i < chunks_.size(); ++i) {
      if (chunks_[i].last_request + kIdleRequests < requests_) {
        drop_if_kept(i);
      }
    }
  }

  void drop_if_kept(size_t i) {
    if (chunks_[i].state != State::kKept) {
      return;
    }
#if defined(__linux__)
    madvise(first_ + i * kChunkBytes, kChunkBytes, MADV_DONTNEED);
#endif
    chunks_[i].state = State::kUntouched;
    --kept_;
  }

  std::mutex mutex_;
  char* first_ = nullptr;
  size_t most_chunks_ = 0;
  std::vector<Chunk> chunks_;  // up to the last one that was ever used
  size_t kept_ = 0;
  size_t used_ = 0;
  size_t most_used_ = 0;
  uint64_t requests_ = 0;
};

// Not initialised.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto elements = static_cast<size_t>(c10::multiply_integers(sizes));
  if (elements * options.dtype().itemsize() < KeptMemory::kLeastBytes) {
    return at::empty(sizes, options);
  }
  return at::detail::empty_generic(sizes, &KeptMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace saml_kernels
