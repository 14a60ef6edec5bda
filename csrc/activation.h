// Activations δ, scores and roundings: the numbers by which the operators take them, and names.
#pragma once

#include <cstdint>
#include <iterator>

namespace saml_kernels {

enum class Activation : int64_t { kRelu, kLeakyRelu, kGelu, kSilu, kTanh, kIdentity };
enum class Score : int64_t { kRatio, kSoftmax };

// What the factors of a product are rounded to before they meet: nothing, bfloat16, or int8 with one scale a row of the
// input and a column of the weight.
enum class Rounding : int64_t { kNone, kBfloat16, kInt8 };
inline constexpr int64_t kRoundings = static_cast<int64_t>(Rounding::kInt8) + 1;

struct ActivationRow {
  const char* name;
  bool needs_preact;  // δ' is computed from the pre-activation z, as it does not follow from δ(z)
};

// In the order of the enumerators.
inline constexpr ActivationRow kActivations[] = {{"relu", false}, {"leaky_relu", false}, {"gelu", true},
                                                 {"silu", true},  {"tanh", false},       {"identity", false}};
inline constexpr const char* kScores[] = {"ratio", "softmax"};
static_assert(std::size(kActivations) == static_cast<int64_t>(Activation::kIdentity) + 1);
static_assert(std::size(kScores) == static_cast<int64_t>(Score::kSoftmax) + 1);

constexpr bool needs_preact(Activation activation) {
  return kActivations[static_cast<int64_t>(activation)].needs_preact;
}

}  // namespace saml_kernels
