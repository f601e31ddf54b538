// Rotary position embedding from tables of cosines and sines.
#pragma once

#include "simd.hpp"
#include "team.hpp"

namespace infc {

// How the elements pair up: half: (i, i + rotary/2); interleaved: (2i, 2i + 1).
enum class RopeStyle { half, interleaved };

// Rotates one head: put(d, value) is called once for each d < dim. cos and sin are the table rows
// of the position, rotary_dim / 2 wide; elements past rotary_dim pass through. Products and the
// sum are rounded one by one, as in the unfused form.
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

// x [T, heads, dim] with row stride ldx → y; tables [positions, rotary_dim / 2]. y may be x.
template <class T, class TT, class Pos>
void rope(const Team& t, const T* x, int64_t ldx, T* y, int64_t ldy, const Pos* positions,
          const TT* cos, const TT* sin, int64_t rotary_dim, RopeStyle style, int64_t heads,
          int64_t dim, int64_t tokens) {
  const Share share = share_of(t, tokens * heads);
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t token = u / heads;
    const int64_t head = u % heads;
    const int64_t row = static_cast<int64_t>(positions[token]) * (rotary_dim / 2);
    T* out = y + token * ldy + head * dim;
    rope_row(x + token * ldx + head * dim, cos + row, sin + row, dim, rotary_dim, style,
             [&](int64_t d, T value) { out[d] = value; });
  }
}

}  // namespace infc
