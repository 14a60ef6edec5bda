// One tile that several threads compute: one of them leads, the others help with products that it shares out.
//
// The leader never waits for a thread that has not come yet, only for items that are taken: where other programs keep
// the cores busy, it does the work alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "trunk.h"

namespace saml_kernels {

class SharedTile {
 public:
  // As kernels see it.
  Team team(int64_t workers) { return {workers, this, &share_out}; }

  // Called by every thread: the first one computes the tile by `function`, the others help until it is done.
  template <typename Function>
  void compute(const Function& function) {
    if (led_.exchange(true)) {
      help();
      return;
    }
    const Finish finish(*this);
    function();
  }

 private:
  // Lets the helpers go, also where the leader fails.
  class Finish {
   public:
    explicit Finish(SharedTile& tile) : tile_(tile) {}
    ~Finish() { tile_.finished_.store(true, std::memory_order_release); }
    Finish(const Finish&) = delete;
    Finish& operator=(const Finish&) = delete;

   private:
    SharedTile& tile_;
  };

  void help() {
    constexpr int kSpins = 256;
    const int64_t worker = helpers_.fetch_add(1) + 1;
    for (int idle = 0; !finished_.load(std::memory_order_acquire);) {
      if (take(worker)) {
        idle = 0;
      } else if (++idle >= kSpins) {
        std::this_thread::yield();
      }
    }
  }

  static void share_out(void* tile, int64_t count, Team::Item item, void* context) {
    SharedTile& self = *static_cast<SharedTile*>(tile);
    // Nobody reads these: all items of the products before are done.
    self.item_ = item;
    self.context_ = context;
    self.count_ = count;
    self.done_.store(0, std::memory_order_relaxed);
    self.left_.store(((self.left_.load(std::memory_order_relaxed) >> kBits) + 1) << kBits | count,
                     std::memory_order_release);
    while (self.take(kLeader)) {
    }
    while (self.done_.load(std::memory_order_acquire) < count) {
      std::this_thread::yield();
    }
  }

  // Takes an item and does it; false where none is left.
  bool take(int64_t worker) {
    int64_t left = left_.load(std::memory_order_acquire);
    do {
      if ((left & kMask) == 0) {
        return false;
      }
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acquire));
    item_(context_, count_ - (left & kMask), worker);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  // Whichever thread it is; helpers have the numbers after it.
  static constexpr int64_t kLeader = 0;
  // The number of the products, of which a thread that comes late must not take an item of later ones, and items left.
  static constexpr int kBits = 32;
  static constexpr int64_t kMask = (int64_t{1} << kBits) - 1;

  std::atomic<bool> led_{false};
  std::atomic<bool> finished_{false};
  std::atomic<int64_t> helpers_{0};
  std::atomic<int64_t> left_{0};
  std::atomic<int64_t> done_{0};
  Team::Item item_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace saml_kernels
