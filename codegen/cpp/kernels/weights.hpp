// What elements of a row weigh when one is drawn, and how they are ordered.
#pragma once

#include <limits>

#include "math.hpp"
#include "simd.hpp"

namespace infc {

constexpr int64_t kWeightBlock = 512;  // elements whose weights are summed in float
constexpr int kSortedWeights = 64;     // elements that are sorted, no longer searched

// Integers that order as the floats do; both zeros are one.
INFC_INLINE i32x16 keys_of(const f32x16& x) {
  const i32x16 bits = bits_of(x + zeros());
  return bits ^ (shift_right<31>(bits) & splat_int<i32x16>(INT32_MAX));
}
INFC_INLINE int32_t key_of(float x) {
  const int32_t bits = bits_of(x + 0.0f);
  return bits ^ (shift_right<31>(bits) & INT32_MAX);
}

// e**((x - greatest) / temperature). A temperature that float cannot tell from 0 leaves the greatest
// alone.
class Weigh {
 public:
  Weigh(float greatest, double temperature)
      : top_(set1(greatest)), divisor_(set1(max(static_cast<float>(temperature), kLeast))) {}

  INFC_INLINE f32x16 operator()(const f32x16& x) const {
    const f32x16 below = (x - top_) / divisor_;
    return select(lt(below, set1(-103.0f)), zeros(), exp(below));
  }

 private:
  static constexpr float kLeast = std::numeric_limits<float>::min();
  f32x16 top_;
  f32x16 divisor_;
};

// The weight that is to be reached for a share of the sum. A share that is no normal number reads as
// zero here, which nothing would reach from below.
inline double share_of_weight(double share, double sum) {
  constexpr double kLeast = std::numeric_limits<double>::min();
  const double wanted = share * sum;
  return wanted > kLeast ? wanted : kLeast;
}

}  // namespace infc
