// Laid out weights that are kept between calls while somebody asks for it (the operator keep_layouts).
//
// A layout is that of a tensor at a version of it. torch counts every write in place but those through .data and by
// other libraries, which is why keeping has to be asked for. What is kept holds its weight, so that nothing else can
// come to stand in that memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <utility>

namespace saml_kernels {

// One layout of a weight: the instruction set's kernels, its number among theirs, its elements.
struct LayoutKey {
  const void* kernels;
  int64_t kind;
  int64_t elements;

  auto operator<=>(const LayoutKey&) const = default;
};

class KeptLayouts {
 public:
  static KeptLayouts& instance() {
    // Never destroyed: at the end of the process torch may be gone before it.
    static KeptLayouts* const layouts = new KeptLayouts;
    return *layouts;
  }

  // Whether layouts of this tensor are kept: asked for, and a parameter. What was computed for one call is none.
  bool wants(const at::Tensor& weight) const {
    const std::lock_guard lock(mutex_);
    return users_ > 0 && weight.requires_grad() && !weight.is_inference();
  }

  // The layout of the tensor as it is now; an undefined tensor where it is not kept.
  at::Tensor find(const at::Tensor& weight, const LayoutKey& layout) const {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find({weight.const_data_ptr(), layout});
    const bool current =
        found != entries_.end() && found->second.weight.is_same(weight) && found->second.version == weight._version();
    return current ? found->second.panels : at::Tensor();
  }

  void keep(const at::Tensor& weight, const LayoutKey& layout, const at::Tensor& panels) {
    const std::lock_guard lock(mutex_);
    if (users_ > 0) {
      entries_.insert_or_assign({weight.const_data_ptr(), layout}, Entry{weight, weight._version(), panels});
    }
  }

  void begin() {
    const std::lock_guard lock(mutex_);
    ++users_;
  }

  // What is kept is given back with the last end.
  void end() {
    const std::lock_guard lock(mutex_);
    TORCH_CHECK(users_ > 0, "keep_layouts(False) without a keep_layouts(True) before it");
    if (--users_ == 0) {
      entries_.clear();
    }
  }

 private:
  struct Entry {
    at::Tensor weight;
    int64_t version;
    at::Tensor panels;
  };

  mutable std::mutex mutex_;
  int64_t users_ = 0;
  std::map<std::pair<const void*, LayoutKey>, Entry> entries_;
};

}  // namespace saml_kernels
