// Matrices in somebody else's memory.
#pragma once

#include <cstdint>
#include <type_traits>

namespace saml_kernels {

// Row-major: element (r, c) stands at data[r * ld + c]. Without data where a matrix is absent or has no elements.
template <typename element_t>
struct MatrixView {
  element_t* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;

  element_t* row(int64_t r) const { return data + r * ld; }
  MatrixView row_range(int64_t begin, int64_t end) const { return {row(begin), end - begin, cols, ld}; }
  MatrixView columns(int64_t begin, int64_t count) const { return {data + begin, rows, count, ld}; }

  operator MatrixView<const element_t>() const
    requires(!std::is_const_v<element_t>)
  {
    return {data, rows, cols, ld};
  }
};

// As parameters, where another one tells the element type: views of both kinds convert.
template <typename scalar_t>
using ConstMatrix = MatrixView<const std::type_identity_t<scalar_t>>;
template <typename scalar_t>
using Matrix = MatrixView<std::type_identity_t<scalar_t>>;

// [left ; right], side by side. right may be absent.
template <typename scalar_t>
struct Concatenated {
  MatrixView<const scalar_t> left;
  MatrixView<const scalar_t> right = {};

  int64_t rows() const { return left.rows; }
  int64_t cols() const { return left.cols + right.cols; }
  Concatenated row_range(int64_t begin, int64_t end) const {
    return {left.row_range(begin, end), right.row_range(begin, end)};
  }
};

}  // namespace saml_kernels
