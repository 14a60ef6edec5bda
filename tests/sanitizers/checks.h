// Judgements of results: what fails is printed and counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "run.h"

namespace saml_kernels {

inline int failures = 0;

inline void fail(const std::string& where, const std::string& what) {
  std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
  ++failures;
}

inline void check_no_nan(const std::string& where, const std::vector<Result>& results) {
  for (const auto& [name, values] : results) {
    if (!std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); })) {
      fail(where, name + " holds a value that is not finite");
    }
  }
}

// Every result that both have; one without gradients has fewer.
inline void check_same_bits(const std::string& where, const std::vector<Result>& results,
                            const std::vector<Result>& expected) {
  for (size_t i = 0; i < std::min(results.size(), expected.size()); ++i) {
    if (results[i].second != expected[i].second) {
      fail(where, results[i].first + " differs");
    }
  }
}

inline void check_close(const std::string& where, const std::vector<Result>& results,
                        const std::vector<Result>& expected, double tolerance) {
  for (size_t i = 0; i < std::min(results.size(), expected.size()); ++i) {
    double distance = 0, norm = 0;
    for (size_t j = 0; j < expected[i].second.size(); ++j) {
      distance += std::pow(results[i].second[j] - expected[i].second[j], 2);
      norm += std::pow(expected[i].second[j], 2);
    }
    if (!(std::sqrt(distance) <= tolerance * std::max(std::sqrt(norm), 1e-3))) {
      fail(where, results[i].first + " is " + std::to_string(std::sqrt(distance / norm)) + " from the baseline's");
    }
  }
}

}  // namespace saml_kernels
