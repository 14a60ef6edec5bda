// Runs every function of every instruction set's kernels on odd shapes, in memory that ends where it should, on one
// thread and on several. A sanitizer judges the accesses; the driver itself compares the results: the same bits for
// any number of threads, with streams saved or computed again, with weights laid out before, by tiles or not; no NaN
// although all memory starts as NaN; close to the baseline instruction set.

#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cases.h"
#include "checks.h"
#include "dispatch.h"
#include "run.h"
#include "trunk.h"

namespace saml_kernels {
namespace {

template <typename scalar_t>
const TrunkKernels<scalar_t>& kernels_of(const Capability& capability) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return capability.float_kernels;
  } else {
    return *capability.double_kernels;
  }
}

template <typename scalar_t>
void check_case(const Case& problem, const Capability& capability, bool threads_only, const std::string& where) {
  constexpr int threads = 4;
  const bool rounded = problem.options.own_bfloat16 || problem.options.foreign_rounding != Rounding::kNone;
  const auto run = [&](const Variant& variant, const Capability& of) {
    return Run<scalar_t>(problem, variant, kernels_of<scalar_t>(of)).trunk();
  };
  const auto unit = [&](const Variant& variant, const Capability& of) {
    return Run<scalar_t>(problem, variant, kernels_of<scalar_t>(of)).mutual_unit();
  };
  const auto experts = [&](const Variant& variant, const Capability& of) {
    return Run<scalar_t>(problem, variant, kernels_of<scalar_t>(of)).experts();
  };
  const Variant plain{1, true, false, true, true}, parallel{threads, true, false, true, true};
  const Variant by_tiles{threads, true, false, true, true, true};
  const std::vector<Result> expected = run(plain, capability), alone = unit(plain, capability),
                            all = experts(plain, capability);
  check_same_bits(where + ", threads", run(parallel, capability), expected);
  check_same_bits(where + ", mutual unit on threads", unit(parallel, capability), alone);
  check_same_bits(where + ", recomputed on threads", run({threads, true, true, true, true}, capability), expected);
  check_same_bits(where + ", experts on threads", experts(parallel, capability), all);
  check_same_bits(where + ", laid out by tiles", run(by_tiles, capability), expected);
  check_same_bits(where + ", experts, laid out by tiles", experts(by_tiles, capability), all);
  if (threads_only) {
    return;
  }
  check_no_nan(where, expected);
  check_no_nan(where + ", experts", all);
  check_no_nan(where + ", mutual unit", alone);
  // A value beside a rounding boundary may fall to either side; of bfloat16 trunks some capabilities round in backward.
  const double tolerance = problem.options.own_bfloat16      ? 3e-2
                           : rounded                         ? 1e-2
                           : std::is_same_v<scalar_t, float> ? 1e-4
                                                             : 1e-10;
  check_close(where, expected, run(plain, kBaseline), tolerance);
  check_close(where + ", mutual unit", alone, unit(plain, kBaseline), tolerance);
  check_close(where + ", experts", all, experts(plain, kBaseline), tolerance);
  const std::pair<const char*, Variant> variants[] = {
      {"recomputed, laid out by tiles", {threads, true, true, true, true, true}},
      {"laid out by the tiles of one thread", {1, true, false, true, true, true}},
      {"not laid out", {threads, true, false, false, true}},
      {"recomputed, not laid out", {1, true, true, false, true}},
      {"nothing saved", {threads, false, false, true, true}},
      {"nothing saved, not laid out", {1, false, false, false, true}},
      {"parameters only", {threads, true, false, true, false}},
  };
  // Products of parts round differently from products of floats.
  const bool same_products = !kernels_of<scalar_t>(capability).layouts.float_parts;
  for (const auto& [name, variant] : variants) {
    if (variant.laid_out || same_products) {
      check_same_bits(where + ", " + name, run(variant, capability), expected);
    } else {
      check_close(where + ", " + name, run(variant, capability), expected, tolerance);
    }
    // Of transposes that are laid out sums over experts go on in another order.
    if (variant.laid_out) {
      check_same_bits(where + ", experts, " + name, experts(variant, capability), all);
    } else {
      check_close(where + ", experts, " + name, experts(variant, capability), all, tolerance);
    }
  }
}

}  // namespace
}  // namespace saml_kernels

// Arguments: "all", or "threads", which checks only what differs between one thread and several, enough for
// ThreadSanitizer, which is slow; then the instruction set.
int main(int count, char** arguments) {
  using namespace saml_kernels;
  const std::string what = count == 3 ? arguments[1] : "", name = count == 3 ? arguments[2] : "";
  const bool threads_only = what == "threads";
  int checked = 0;
  for (const Capability* capability : supported_capabilities()) {
    if ((what != "all" && !threads_only) || capability->name != name) {
      continue;
    }
    for (const Case& original : cases()) {
      const std::string where = std::string(capability->name) + ", " + original.name;
      Case rounded = original;
      rounded.options.foreign_rounding = Rounding::kInt8;
      check_case<float>(rounded, *capability, threads_only, where + ", foreign int8");
      ++checked;
      // All else is the code of avx2 and avx512.
      if (name == "avx2_vnni" || name == "avx512_vnni") {
        continue;
      }
      check_case<float>(original, *capability, threads_only, where + ", float");
      rounded.options.foreign_rounding = Rounding::kBfloat16;
      check_case<float>(rounded, *capability, threads_only, where + ", foreign bfloat16");
      checked += 2;
      if (threads_only) {
        continue;
      }
      rounded.options.own_bfloat16 = true;
      check_case<float>(rounded, *capability, threads_only, where + ", bfloat16");
      check_case<double>(original, *capability, threads_only, where + ", double");
      checked += 2;
    }
  }
  std::printf("%s: %d cases, %d failures\n", name.c_str(), checked, failures);
  return failures == 0 && checked > 0 ? 0 : 1;
}
