// How the rows of a batch are cut into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace saml_kernels {

constexpr int64_t kMostTileRows = 96;

// Tiles as even as they come where each begins at a multiple of rows, the longer ones first: so threads that take them
// in turn get as much as each other, and none is waited for.
struct RowTiles {
  int64_t rows = 0;
  int64_t multiple = 1;
  int64_t count = 0;  // no more than multiples; none where there are no rows

  int64_t begin(int64_t tile) const {
    return (tile * (multiples() / count) + std::min(tile, multiples() % count)) * multiple;
  }
  int64_t end(int64_t tile) const { return std::min(begin(tile + 1), rows); }
  // Of the longest, up to the next multiple.
  int64_t most_rows() const { return count == 0 ? 0 : (multiples() + count - 1) / count * multiple; }

 private:
  int64_t multiples() const { return (rows + multiple - 1) / multiple; }
};

// What tiles of rows begin at multiples of.
struct RowMultiples {
  int64_t whole;  // leaves the products no tile of fewer rows to compute but the last
  int64_t least;  // the finest they take
};

// Many rows use a weight often while it is in cache, few leave every core its share, and every thread gets as many
// tiles as any other, which are whole where one more of a product's is little beside what a thread has of them. How a
// row is computed depends on none of it, so the number of threads may decide.
inline RowTiles row_tiles(int64_t rows, RowMultiples multiples, int64_t threads) {
  constexpr int64_t kTilesPerThread = 2, kWholePerThread = 32;
  const auto parts = [](int64_t x, int64_t size) { return (x + size - 1) / size; };
  // One thread has nobody to wait for: every tile more reads the weights once more.
  const int64_t least = threads == 1 ? 1 : kTilesPerThread * threads;
  const int64_t tiles = std::max(least, parts(parts(rows, kMostTileRows), threads) * threads);
  const int64_t multiple = rows >= kWholePerThread * multiples.whole * threads ? multiples.whole : multiples.least;
  return {rows, multiple, std::min(parts(rows, multiple), tiles)};
}

}  // namespace saml_kernels
