// Products of emulated tiles, compiled without sanitizers: they touch nothing but a thread's own registers, and take
// most of the time.

#define SAML_VECTOR_BYTES 64
#include "intrinsics.h"

namespace saml_kernels::emulated {

// Even and odd k sum apart and meet before they are added to what stands there.
void multiply_bfloat16(const Tile& left, const Tile& right, int rows, int depth, int columns, Tile& out) {
  for (int m = 0; m < rows; ++m) {
    float even[Tile::kMostBytes / 4] = {}, odd[Tile::kMostBytes / 4] = {};
    for (int k = 0; k < depth; ++k) {
      const uint32_t x = left.unit[m][k];
      for (int n = 0; n < columns; ++n) {
        const uint32_t y = right.unit[k][n];
        even[n] = fused(even[n], static_cast<uint16_t>(x), static_cast<uint16_t>(y));
        odd[n] = fused(odd[n], static_cast<uint16_t>(x >> 16), static_cast<uint16_t>(y >> 16));
      }
    }
    for (int n = 0; n < columns; ++n) {
      out.unit[m][n] = as_bits(flushed(flushed(as_float(out.unit[m][n])) + flushed(even[n] + odd[n])));
    }
  }
}

void multiply_bytes(const Tile& left, const Tile& right, int rows, int depth, int columns, Tile& out) {
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < columns; ++n) {
        out.unit[m][n] += byte_products(left.unit[m][k], right.unit[k][n]);
      }
    }
  }
}

}  // namespace saml_kernels::emulated
