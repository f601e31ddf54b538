// Activations by name, and the gated product of an MLP.
#pragma once

#include "math.hpp"
#include "team.hpp"

namespace infc {

enum class Act { silu, gelu, gelu_tanh, relu };

template <Act A, class V>
INFC_INLINE V activate(const V& x) {
  if constexpr (A == Act::silu) return silu(x);
  if constexpr (A == Act::gelu) return gelu(x);
  if constexpr (A == Act::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Act::relu) return relu(x);
}

// act(gate) * up.
template <Act A>
struct PlainGate {
  INFC_INLINE f32x16 operator()(const f32x16& gate, const f32x16& up) const {
    return activate<A>(gate) * up;
  }
};

// act(min(gate, limit)) * (clamp(up, -limit, limit) + shift); silu is x * sigmoid(alpha * x).
template <Act A>
struct LimitedGate {
  float alpha;
  float limit;
  float shift;
  INFC_INLINE f32x16 operator()(const f32x16& gate, const f32x16& up) const {
    const f32x16 g = min(gate, set1(limit));
    const f32x16 u = max(min(up, set1(limit)), set1(-limit)) + set1(shift);
    if constexpr (A == Act::silu) return g * sigmoid(set1(alpha) * g) * u;
    return activate<A>(g) * u;
  }
};

// y[i] = combine(gate[i], up[i]) in float, one rounding.
template <class Gate, class T, class TY>
INFC_INLINE void gated_row(const Gate& combine, const T* gate, const T* up, TY* y, int64_t count) {
  for_each_group(count, [&](int64_t i, int64_t n) {
    store_group(y + i, combine(load_group(gate + i, n), load_group(up + i, n)), n);
  });
}

// x [rows, 2 * I] (gate first, row stride ldx) → y [rows, I] (row stride ldy). Threads share the
// columns of each row, in groups of 16.
template <class Gate, class T, class TY>
void gated_rows(const Team& t, const Gate& combine, const T* x, int64_t ldx, TY* y, int64_t ldy,
                int64_t rows, int64_t I) {
  const int64_t groups = ceil_groups(I);
  const Share share = share_of(t, rows * groups);
  for (int64_t u = share.begin; u < share.end;) {
    const int64_t r = u / groups;
    const int64_t next = (r + 1) * groups < share.end ? (r + 1) * groups : share.end;
    const int64_t begin = (u - r * groups) * kLanes;
    const int64_t end = (next - r * groups) * kLanes < I ? (next - r * groups) * kLanes : I;
    const T* gate = x + r * ldx;
    gated_row(combine, gate + begin, gate + I + begin, y + r * ldy + begin, end - begin);
    u = next;
  }
}
template <Act A, class T, class TY>
void gated_act(const Team& t, const T* x, int64_t ldx, TY* y, int64_t ldy, int64_t rows,
               int64_t I) {
  gated_rows(t, PlainGate<A>{}, x, ldx, y, ldy, rows, I);
}

}  // namespace infc
