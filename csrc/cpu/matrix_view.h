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

// How a number stands in memory: as what it is computed with, or in 16 bits.
enum class Storage : uint8_t { kComputed, kBfloat16, kFloat16 };

// A row-major matrix that is read, or where scalar_t is not const written, as scalar_t, however it is stored.
template <typename scalar_t>
struct StoredMatrix {
  using pointer = std::conditional_t<std::is_const_v<scalar_t>, const void*, void*>;
  using byte_pointer = std::conditional_t<std::is_const_v<scalar_t>, const char*, char*>;

  pointer data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  Storage storage = Storage::kComputed;

  StoredMatrix() = default;
  StoredMatrix(pointer first, int64_t row_count, int64_t col_count, int64_t row_stride, Storage stored_as)
      : data(first), rows(row_count), cols(col_count), ld(row_stride), storage(stored_as) {}
  StoredMatrix(const MatrixView<scalar_t>& view) : data(view.data), rows(view.rows), cols(view.cols), ld(view.ld) {}
  StoredMatrix(const MatrixView<std::remove_const_t<scalar_t>>& view)
    requires(std::is_const_v<scalar_t>)
      : data(view.data), rows(view.rows), cols(view.cols), ld(view.ld) {}

  int64_t element_size() const { return storage == Storage::kComputed ? sizeof(scalar_t) : 2; }
  pointer at(int64_t r, int64_t c) const { return static_cast<byte_pointer>(data) + (r * ld + c) * element_size(); }
  StoredMatrix row_range(int64_t begin, int64_t end) const { return {at(begin, 0), end - begin, cols, ld, storage}; }
  StoredMatrix columns(int64_t begin, int64_t count) const { return {at(0, begin), rows, count, ld, storage}; }
  // Where it is stored as what it is computed with.
  MatrixView<scalar_t> view() const { return {static_cast<scalar_t*>(data), rows, cols, ld}; }
};

template <typename scalar_t>
using ConstStored = StoredMatrix<const std::type_identity_t<scalar_t>>;
template <typename scalar_t>
using Stored = StoredMatrix<std::type_identity_t<scalar_t>>;

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
