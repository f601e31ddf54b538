// Rows of logits as they are read to take a token.
#pragma once

#include "simd.hpp"

namespace infc {

// `group` gives up to 16 elements from place i on as float, `at` one.
template <class T>
struct Logits {
  const T* x;

  INFC_INLINE f32x16 group(int64_t i, int64_t n) const { return load_group(x + i, n); }
  float at(int64_t i) const { return to_float(x[i]); }
};

}  // namespace infc
