// The shapes the kernels run on: odd widths leave a remainder in every vector, panel and tile.
#pragma once

#include <cstdint>
#include <vector>

#include "trunk.h"

namespace saml_kernels {

struct Options {
  bool scalar_gate = false;
  Score score = Score::kRatio;
  Activation activation = Activation::kRelu;
  bool per_branch = false;
  bool own_bfloat16 = false;
  Rounding foreign_rounding = Rounding::kNone;
  bool gate = false;  // of a grouped MLP: the result is a gate's
};

struct Case {
  const char* name;
  int64_t scenarios;
  int64_t rows;
  int64_t local;
  int64_t global;
  std::vector<int64_t> widths;
  std::vector<int64_t> aux_widths;  // all 0: a grouped MLP
  std::vector<int64_t> mutual;      // counted from 0
  Options options;
};

inline std::vector<Case> cases() {
  constexpr auto kSoftmax = Score::kSoftmax;
  using enum Activation;
  const Options scalar_gelu{.scalar_gate = true, .score = kSoftmax, .activation = kGelu};
  const Options silu_views{.score = kSoftmax, .activation = kSilu, .per_branch = true};
  return {
      {"one scenario", 1, 40, 5, 3, {17, 33}, {9, 1}, {0}, {}},
      {"one row", 3, 1, 1, 1, {1, 1}, {1, 1}, {0}, {.score = kSoftmax, .activation = kGelu, .per_branch = true}},
      {"few rows", 3, 5, 37, 7, {133, 131}, {66, 129}, {0, 1}, {}},
      {"more rows, read in place", 3, 23, 37, 7, {133, 131}, {66, 129}, {0, 1}, {}},
      {"no rows", 2, 0, 4, 4, {5, 3}, {2, 2}, {0, 1}, {.activation = kSilu}},
      {"views", 2, 101, 33, 5, {33, 47}, {47, 17}, {1}, {.activation = kLeakyRelu, .per_branch = true}},
      {"two tables", 3, 61, 4, 5, {47, 17, 1}, {17, 1, 33}, {0, 1}, scalar_gelu},
      {"three tables", 4, 61, 4, 5, {16, 33, 17}, {32, 17, 1}, {0, 1, 2}, silu_views},
      {"a layer between", 3, 61, 4, 5, {33, 70, 47}, {17, 33, 5}, {0, 2}, {.activation = kTanh}},
      {"many scenarios", 64, 130, 4, 5, {17, 8}, {5, 6}, {0}, {.activation = kIdentity}},
      {"many scores", 40, 90, 4, 5, {40, 8}, {5, 6}, {0}, {}},
      {"many tables", 33, 13, 4, 5, {7, 5}, {5, 6}, {0, 1}, {.score = kSoftmax}},
      {"no mutual unit", 7, 100, 47, 9, {17, 16}, {33, 32}, {}, {.activation = kTanh}},
      {"grouped", 5, 100, 47, 0, {100, 31}, {0, 0}, {}, {}},
      {"grouped with a gate", 5, 100, 47, 0, {100, 31}, {0, 0}, {}, {.gate = true}},
      {"a gate of one layer", 2, 40, 9, 0, {17}, {0}, {}, {.activation = kGelu, .gate = true}},
      {"no local", 2, 50, 0, 7, {9, 5}, {110, 3}, {0}, {}},
      {"no local views", 2, 50, 0, 7, {9, 5}, {110, 3}, {0, 1}, {.scalar_gate = true, .per_branch = true}},
      {"no global", 2, 50, 7, 0, {9, 5}, {11, 3}, {1}, {}},
      {"wide", 1, 600, 65, 100, {65, 130}, {47, 98}, {0}, {}},
      {"whole panels", 2, 200, 32, 16, {96, 64}, {64, 32}, {0}, {}},
      {"wide scalar", 2, 300, 200, 13, {16, 3}, {5, 200}, {0}, {.scalar_gate = true, .score = kSoftmax}},
  };
}

}  // namespace saml_kernels
