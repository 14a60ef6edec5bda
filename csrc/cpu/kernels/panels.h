// Panels of a weight as the products of tiles find them. Included once per capability, after units.h.
//
// They are laid out before the tiles run, by the tiles, by a thread for the tiles it takes, or by every product for
// itself. By the tiles: the first product that comes to a panel lays it out for itself and for all others; one that
// comes meanwhile does not wait for it. What a product is going to read next, rows of a weight or a panel, it asks for
// while it computes.

// Memory that is read after a product: while it is computed, lines of it are asked for every kTermsAtOnce terms, each
// `step` bytes behind the one before it. Where fewer rows of a register tile meet a term, more of them do in turn.
constexpr int64_t kTermsAtOnce = 4;
constexpr int64_t kLinesAtOnce = SAML_VECTOR_BYTES == 64 ? 2 : 1;

struct Ahead {
  const char* line;
  int64_t step;

  void ask() {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLinesAtOnce; ++i, line += step) {
      __builtin_prefetch(line);
    }
  }
};

// Lines that are so far apart.
struct Span {
  const void* first = nullptr;
  int64_t step = 0;
  int64_t count = 0;
};

// Lines of memory, for one product after the other.
class Lines {
 public:
  Lines() = default;
  explicit Lines(Span first, Span then = {}) : now_(first), then_(then) {}

  // Where there are none, a place that is in cache in their stead.
  Lines or_none(const void* place) const { return now_.count > 0 ? *this : Lines({place, 0, 0}); }

  // Those for a product over so many terms.
  Ahead next(int64_t terms) {
    if (now_.count == 0 && then_.count > 0) {
      now_ = std::exchange(then_, Span());
    }
    const char* line = static_cast<const char*>(now_.first);
    const Ahead ahead{line, now_.count > 0 ? now_.step : 0};
    const int64_t count = std::min(now_.count, terms / kTermsAtOnce * kLinesAtOnce);
    now_.first = line + count * now_.step;
    now_.count -= count;
    return ahead;
  }

 private:
  Span now_;
  Span then_;
};

// A vector of a panel that others read later, past the caches: a line that is written whole need not be read before.
template <typename scalar_t>
inline void store_for_others(scalar_t* p, vec<scalar_t> v) {
#if SAML_VECTOR_BYTES == 64
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif SAML_VECTOR_BYTES == 32
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#else
  store(p, v);
#endif
}

// Before others are told of what has been stored so.
inline void finish_stores_for_others() {
#if SAML_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

// Where a product finds a panel, or is to lay it out.
template <typename element_t>
struct PanelPlace {
  element_t* data;
  bool laid_out;
  // Where to lay it out for all others as well, and where it is said that it is laid out; else null.
  element_t* shared;
  uint8_t* state;

  // Once it is laid out, so many elements; there as well, or not yet.
  void share(int64_t count, bool there) const {
    if (state == nullptr) {
      return;
    }
    if (shared != nullptr) {
      if (!there) {
        std::copy_n(data, count, shared);
      }
      finish_stores_for_others();
    }
    __atomic_store_n(state, kLaidOut, __ATOMIC_RELEASE);
  }
};

// The panels of one matrix.
template <typename element_t>
struct Panels {
  Layout<element_t> layout = {};  // nowhere: every product lays them out for itself
  int64_t terms = 0;
  int64_t tile = 0;      // that reads them
  Lines following = {};  // after the last of them
  bool own = false;      // nobody but this thread reads them

  Panels columns(int64_t column) const {
    Panels part = *this;
    part.layout.first += part.layout.first == nullptr ? 0 : column * terms;
    part.layout.states += part.layout.states == nullptr ? 0 : column;
    return part;
  }

  // Which of `count` panels a product begins with: tiles that begin together lay out different ones.
  int64_t begin(int64_t count) const {
    constexpr uint32_t kGoldenRatio = 0x9e3779b9;
    const uint64_t fraction = static_cast<uint32_t>(tile) * kGoldenRatio;
    return layout.states == nullptr ? 0 : static_cast<int64_t>(fraction * static_cast<uint64_t>(count) >> 32);
  }

  // Whether the panel that begins at this column is laid out.
  bool laid_out(int64_t column) const {
    return layout.first != nullptr &&
           (layout.states == nullptr || __atomic_load_n(layout.states + column, __ATOMIC_ACQUIRE) == kLaidOut);
  }

  // Of a panel of so many columns that is laid out.
  Lines lines(int64_t column, int64_t width) const {
    return Lines({layout.first + column * terms, 64, terms * width * static_cast<int64_t>(sizeof(element_t)) / 64});
  }

  // The same where it is not: rows of B.
  template <typename scalar_t>
  Lines lines(const StoredMatrix<const scalar_t>& b, int64_t column, int64_t width) const {
    if (laid_out(column)) {
      return lines(column, width);
    }
    if (b.data == nullptr) {
      return {};
    }
    const int64_t step = b.ld * b.element_size();
    const char* first = static_cast<const char*>(b.at(0, column));
    // No panel is wider than two lines.
    return Lines({first, step, b.rows}, {first + 64, step, width * b.element_size() > 64 ? b.rows : 0});
  }

  // Its place: `otherwise` where it is not laid out yet, unless it is to be there.
  PanelPlace<element_t> take(int64_t column, element_t* otherwise) const {
    if (layout.first == nullptr) {
      return {otherwise, false, nullptr, nullptr};
    }
    element_t* const panel = layout.first + column * terms;
    if (laid_out(column)) {
      return {panel, true, nullptr, nullptr};
    }
    uint8_t* const state = layout.states + column;
    if (own) {
      return {panel, false, nullptr, state};
    }
    uint8_t before = kNotLaidOut;
    if (__atomic_compare_exchange_n(state, &before, kBeingLaidOut, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
      return {otherwise, false, panel, state};
    }
    const bool done = before == kLaidOut;
    return {done ? panel : otherwise, done, nullptr, nullptr};
  }
};
