// Appended to a copy of csrc/cpu/kernels/tile.h: every piece of scratch memory, but those that last, starts as NaN,
// and all end at a fence that AddressSanitizer watches, so that a piece that is too small shows although its neighbour
// has room.

template <typename scalar_t>
inline scalar_t* fenced_piece(char* block, int64_t& bytes, int64_t count, bool lasts) {
  constexpr int64_t kFence = 64;
  const int64_t size = count * static_cast<int64_t>(sizeof(scalar_t));
  const int64_t whole = round_up(size, 64) + kFence;
  char* piece = block == nullptr ? nullptr : block + bytes;
  if (piece != nullptr) {
    ASAN_UNPOISON_MEMORY_REGION(piece, size);
    if (!lasts) {
      std::memset(piece, 0xff, static_cast<size_t>(size));
    }
    ASAN_POISON_MEMORY_REGION(piece + size, whole - size);
  }
  bytes += whole;
  return reinterpret_cast<scalar_t*>(piece);
}

#define SAML_FENCED(scalar_t, element_t, take, lasts)                   \
  template <>                                                           \
  template <>                                                           \
  inline element_t* Scratch<scalar_t>::take<element_t>(int64_t count) { \
    return fenced_piece<element_t>(block_, bytes_, count, lasts);       \
  }
SAML_FENCED(float, float, take, false)
SAML_FENCED(float, double, take, false)
SAML_FENCED(float, uint16_t, take, false)
SAML_FENCED(double, double, take, false)
SAML_FENCED(float, uint16_t, take_lasting, true)
SAML_FENCED(float, uint8_t, take_lasting, true)
