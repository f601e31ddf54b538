// Rows of logits as they are read to take a token: as they lie, or with a mask.
#pragma once

#include <limits>

#include "simd.hpp"

namespace infc {

// `group` gives up to 16 elements from place i on as float, `at` one.
template <class T>
struct Logits {
  const T* x;

  INFC_INLINE f32x16 group(int64_t i, int64_t n) const { return load_group(x + i, n); }
  float at(int64_t i) const { return to_float(x[i]); }
};

// Minus infinity where a mask has no bit: bit i % 32 of word i / 32 is that of element i. NaN and
// infinity remain, so that nobody takes the row for a valid one.
template <class T>
struct MaskedLogits {
  const T* x;
  const uint32_t* mask;

  INFC_INLINE f32x16 group(int64_t i, int64_t n) const {
    alignas(64) static constexpr int32_t kBits[kLanes] = {
        1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
        1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const f32x16 v = load_group(x + i, n);
    const int32_t bits = static_cast<int32_t>(mask[i / 32] >> (i % 32) & 0xffff);
    const i32x16 allowed = splat_int<i32x16>(bits) & load_int32(kBits);
    return select(lt(v, set1(kInfinity)), select(allowed, v, set1(-kInfinity)), v);
  }
  float at(int64_t i) const {
    const float v = to_float(x[i]);
    return (mask[i / 32] >> (i % 32) & 1) != 0 || !(v < kInfinity) ? v : -kInfinity;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
};

}  // namespace infc
