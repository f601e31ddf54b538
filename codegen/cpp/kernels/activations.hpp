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

// y[i] = act(gate[i]) * up[i] in float, one rounding.
template <Act A, class T>
INFC_INLINE void gated_row(const T* gate, const T* up, T* y, int64_t count) {
  for_each_group(count, [&](int64_t i, int64_t n) {
    store_group(y + i, activate<A>(load_group(gate + i, n)) * load_group(up + i, n), n);
  });
}

// x [rows, 2 * I] (gate first, row stride ldx) → y [rows, I] (row stride ldy). Threads share the
// columns of each row, in groups of 16.
template <Act A, class T>
void gated_act(const Team& t, const T* x, int64_t ldx, T* y, int64_t ldy, int64_t rows, int64_t I) {
  const int64_t groups = ceil_groups(I);
  const Share share = share_of(t, rows * groups);
  for (int64_t u = share.begin; u < share.end;) {
    const int64_t r = u / groups;
    const int64_t next = (r + 1) * groups < share.end ? (r + 1) * groups : share.end;
    const int64_t begin = (u - r * groups) * kLanes;
    const int64_t end = (next - r * groups) * kLanes < I ? (next - r * groups) * kLanes : I;
    const T* gate = x + r * ldx;
    gated_row<A>(gate + begin, gate + I + begin, y + r * ldy + begin, end - begin);
    u = next;
  }
}

}  // namespace infc
