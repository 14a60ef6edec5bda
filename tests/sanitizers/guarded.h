// Memory that ends where it should.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace saml_kernels {

// count elements that end at a page nobody may touch: any instruction that runs past them faults, also those that the
// sanitizer does not instrument (masked loads). AddressSanitizer watches the bytes in front of them. They start as NaN.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    const size_t body = (size + page - 1) / page * page;
    mapped_ = body + page;
    void* block = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED || mprotect(static_cast<char*>(block) + body, page, PROT_NONE) != 0) {
      std::perror("driver: no memory");
      std::exit(2);
    }
    block_ = static_cast<char*>(block);
    data_ = reinterpret_cast<T*>(block_ + (body - size));
    std::memset(data_, 0xff, size);
    ASAN_POISON_MEMORY_REGION(block_, body - size);
  }
  ~Guarded() {
    if (block_ != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(block_, mapped_);
      munmap(block_, mapped_);
    }
  }
  Guarded(Guarded&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)),
        data_(other.data_),
        count_(other.count_),
        mapped_(other.mapped_) {}
  Guarded& operator=(Guarded&&) = delete;

  // As trunk.cpp passes tensors on: null without elements.
  T* data() const { return count_ == 0 ? nullptr : data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  char* block_;
  T* data_;
  int64_t count_;
  size_t mapped_;
};

}  // namespace saml_kernels
