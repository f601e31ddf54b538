// Rotary position embedding: cosines and sines of each token, and the rotation by them.
#pragma once

#include "simd.hpp"
#include "team.hpp"

namespace infc {

// sin(x + quarters * pi / 2), for |x| < 2**26. In double precision and without a branch: the float
// nearest to the result is that of the exact one, but for about one in 10**8. Sums and products
// alone, so the bits are the same for every C library and instruction set.
INFC_INLINE double turned_sine(double x, int64_t quarters) {
  // Adding 1.5 * 2**52 rounds to an integer, whose last bits are then those of the sum.
  const double shifted = x * 0x1.45f306dc9c883p-1 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int64_t quarter = bits + quarters;
  // pi / 2 in three parts, the first two of 27 bits: their products with n are exact.
  const double r = ((x - n * 0x1.921fb54p+0) - n * 0x1.10b461p-30) - n * 0x1.a62633145c06ep-58;
  const double s = r * r;
  double odd = -7.6471637318198165e-13;  // Taylor's series: |r| is at most pi / 4
  odd = odd * s + 1.6059043836821613e-10;
  odd = odd * s - 2.5052108385441720e-08;
  odd = odd * s + 2.7557319223985893e-06;
  odd = odd * s - 1.9841269841269841e-04;
  odd = odd * s + 8.3333333333333332e-03;
  odd = odd * s - 1.6666666666666666e-01;
  const double sine = odd * s * r + r;
  double even = 4.7794773323873853e-14;
  even = even * s - 1.1470745597729725e-11;
  even = even * s + 2.0876756987868099e-09;
  even = even * s - 2.7557319223985888e-07;
  even = even * s + 2.4801587301587302e-05;
  even = even * s - 1.3888888888888889e-03;
  even = even * s + 4.1666666666666664e-02;
  const double cosine = even * s * s + (1.0 - 0.5 * s);
  const double value = (quarter & 1) != 0 ? cosine : sine;
  return (quarter & 2) != 0 ? -value : value;
}

// y[token, i] = scale * sin(positions[token] * frequencies[i] + quarters * pi / 2). The angle is
// rounded to float, and so are the sine and the product.
template <class Pos>
void rotary(const Team& t, const Pos* positions, const float* frequencies, float scale, float* y,
            int64_t tokens, int64_t width, int64_t quarters) {
  const Share share = share_of(t, tokens);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const float position = static_cast<float>(positions[token]);
    float* row = y + token * width;
    for (int64_t i = 0; i < width; ++i) {
      const float angle = position * frequencies[i];
      row[i] = static_cast<float>(turned_sine(static_cast<double>(angle), quarters)) * scale;
    }
  }
}

// y [tokens, width]: scaled sines of positions [tokens] times frequencies [width].
template <class Pos>
void rotary_sin(const Team& t, const Pos* positions, const float* frequencies, float scale,
                float* y, int64_t tokens, int64_t width) {
  rotary(t, positions, frequencies, scale, y, tokens, width, 0);
}

// As rotary_sin, cosines.
template <class Pos>
void rotary_cos(const Team& t, const Pos* positions, const float* frequencies, float scale,
                float* y, int64_t tokens, int64_t width) {
  rotary(t, positions, frequencies, scale, y, tokens, width, 1);
}

// How the elements pair up: half: (i, i + rotary/2); interleaved: (2i, 2i + 1).
enum class RopeStyle { half, interleaved };

// Rotates one head: put(d, value) is called once for each d < dim. cos and sin are the rows of the
// token, rotary_dim / 2 wide; elements past rotary_dim pass through. Products and the sum are
// rounded one by one, as in the unfused form.
template <class T, class TT, class Put>
INFC_INLINE void rope_row(const T* x, const TT* cos, const TT* sin, int64_t dim, int64_t rotary_dim,
                          RopeStyle style, Put put) {
  const int64_t half = rotary_dim / 2;
  const int64_t step = style == RopeStyle::half ? 1 : 2;
  const int64_t apart = style == RopeStyle::half ? half : 1;
  for (int64_t i = 0; i < half; ++i) {
    const float c = to_float(cos[i]);
    const float s = to_float(sin[i]);
    const float a = to_float(x[i * step]);
    const float b = to_float(x[i * step + apart]);
    put(i * step, from_float<T>(a * c - b * s));
    put(i * step + apart, from_float<T>(b * c + a * s));
  }
  for (int64_t d = rotary_dim; d < dim; ++d) put(d, x[d]);
}

// x [T, heads, dim] with row stride ldx → y; cos and sin [T, rotary_dim / 2]. y may be x.
template <class T, class TT>
void rope(const Team& t, const T* x, int64_t ldx, T* y, int64_t ldy, const TT* cos, const TT* sin,
          int64_t rotary_dim, RopeStyle style, int64_t heads, int64_t dim, int64_t tokens) {
  const Share share = share_of(t, tokens * heads);
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t token = u / heads;
    const int64_t head = u % heads;
    const int64_t row = token * (rotary_dim / 2);
    T* out = y + token * ldy + head * dim;
    rope_row(x + token * ldx + head * dim, cos + row, sin + row, dim, rotary_dim, style,
             [&](int64_t d, T value) { out[d] = value; });
  }
}

}  // namespace infc
