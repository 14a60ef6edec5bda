// Activations δ and scores: the numbers by which the operators take them, and their names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

namespace saml_kernels {

enum class Activation : int64_t { kRelu, kLeakyRelu, kGelu, kSilu, kTanh, kIdentity };
enum class Score : int64_t { kRatio, kSoftmax };

struct ActivationRow {
  Activation activation;
  const char* name;
  bool needs_preact;  // δ' is computed from the pre-activation z, as it does not follow from δ(z)
};

inline constexpr ActivationRow kActivations[] = {
    {Activation::kRelu, "relu", false}, {Activation::kLeakyRelu, "leaky_relu", false},
    {Activation::kGelu, "gelu", true},  {Activation::kSilu, "silu", true},
    {Activation::kTanh, "tanh", false}, {Activation::kIdentity, "identity", false},
};

struct ScoreRow {
  Score score;
  const char* name;
};

inline constexpr ScoreRow kScores[] = {{Score::kRatio, "ratio"}, {Score::kSoftmax, "softmax"}};

static_assert(
    [] {
      for (size_t i = 0; i < std::size(kActivations); ++i) {
        if (kActivations[i].activation != static_cast<Activation>(i)) return false;
      }
      for (size_t i = 0; i < std::size(kScores); ++i) {
        if (kScores[i].score != static_cast<Score>(i)) return false;
      }
      return true;
    }(),
    "a row stands at the number of its enumerator");

constexpr bool needs_preact(Activation activation) {
  return kActivations[static_cast<size_t>(activation)].needs_preact;
}

}  // namespace saml_kernels
