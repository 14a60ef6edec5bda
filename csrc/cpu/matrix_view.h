// Matrices in somebody else's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace saml_kernels {

// The element of a matrix that is the product of two, element by element; it stands nowhere.
template <typename scalar_t>
struct Product {};

// Reads products as a pointer reads what stands in memory.
template <typename scalar_t>
struct ProductPointer {
  const scalar_t* own = nullptr;
  const scalar_t* shared = nullptr;

  ProductPointer() = default;
  ProductPointer(std::nullptr_t) {}
  ProductPointer(const scalar_t* first, const scalar_t* second) : own(first), shared(second) {}
  ProductPointer operator+(int64_t elements) const { return {own + elements, shared + elements}; }
  scalar_t operator[](int64_t element) const { return own[element] * shared[element]; }
};

template <typename element_t>
struct PointerTo {
  using type = element_t*;
};
template <typename scalar_t>
struct PointerTo<const Product<scalar_t>> {
  using type = ProductPointer<scalar_t>;
};

// Row-major: element (r, c) stands at data[r * ld + c]. Without data where a matrix is absent or has no elements.
template <typename element_t>
struct MatrixView {
  using pointer = typename PointerTo<element_t>::type;

  pointer data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;

  pointer row(int64_t r) const { return data + r * ld; }
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

// How a number stands in memory: as what it is computed with, in 16 bits, or as two numbers of which it is the product.
enum class Storage : uint8_t { kComputed, kBfloat16, kFloat16, kProduct };

constexpr bool in_16_bits(Storage storage) { return storage == Storage::kBfloat16 || storage == Storage::kFloat16; }

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
  const std::remove_const_t<scalar_t>* shared = nullptr;  // of a product the second factor, rows as far apart
  bool passing = false;                                   // caches will have lost it before it is read again

  StoredMatrix() = default;
  StoredMatrix(pointer first, int64_t row_count, int64_t col_count, int64_t row_stride, Storage stored_as,
               const std::remove_const_t<scalar_t>* second = nullptr, bool passes = false)
      : data(first),
        rows(row_count),
        cols(col_count),
        ld(row_stride),
        storage(stored_as),
        shared(second),
        passing(passes) {}
  StoredMatrix(const MatrixView<scalar_t>& view) : data(view.data), rows(view.rows), cols(view.cols), ld(view.ld) {}
  StoredMatrix(const MatrixView<std::remove_const_t<scalar_t>>& view)
    requires(std::is_const_v<scalar_t>)
      : data(view.data), rows(view.rows), cols(view.cols), ld(view.ld) {}

  int64_t element_size() const { return in_16_bits(storage) ? 2 : sizeof(scalar_t); }
  pointer at(int64_t r, int64_t c) const { return static_cast<byte_pointer>(data) + (r * ld + c) * element_size(); }
  StoredMatrix row_range(int64_t begin, int64_t end) const { return part(begin, 0, end - begin, cols); }
  StoredMatrix columns(int64_t begin, int64_t count) const { return part(0, begin, rows, count); }
  operator StoredMatrix<const scalar_t>() const
    requires(!std::is_const_v<scalar_t>)
  {
    return {data, rows, cols, ld, storage, shared, passing};
  }
  // Where it is stored as what it is computed with.
  MatrixView<scalar_t> view() const { return {static_cast<scalar_t*>(data), rows, cols, ld}; }

 private:
  StoredMatrix part(int64_t r, int64_t c, int64_t row_count, int64_t col_count) const {
    return {at(r, c), row_count, col_count, ld, storage, shared == nullptr ? nullptr : shared + r * ld + c, passing};
  }
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

// The same as the input of products, whose parts may stand in bfloat16 where these take them so.
template <typename scalar_t>
struct Input {
  StoredMatrix<const scalar_t> left;
  StoredMatrix<const scalar_t> right = {};

  // Where both stand as what they are computed with.
  Concatenated<scalar_t> view() const { return {left.view(), right.view()}; }
};

}  // namespace saml_kernels
