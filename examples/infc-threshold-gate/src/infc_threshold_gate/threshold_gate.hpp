// silu(gate) * up of rows [gate | up], and 0 where that is below a threshold.
#pragma once

#include "../kernels/activations.hpp"

namespace threshold_gate {

// x [rows, width] (gate first) -> y [rows, width / 2]. Each thread takes its share of the rows.
template <class T>
void run(const infc::Team& t, const T* x, int64_t ldx, T* y, int64_t ldy, int64_t rows,
         int64_t width, float threshold) {
  using namespace infc;
  const int64_t half = width / 2;
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const T* gate = x + r * ldx;
    const T* up = gate + half;
    for_each_group(half, [&](int64_t i, int64_t n) {  // 16 elements, or the n that are left
      const f32x16 v = silu(load_group(gate + i, n)) * load_group(up + i, n);
      store_group(y + r * ldy + i, select(lt(abs(v), set1(threshold)), zeros(), v), n);
    });
  }
}

}  // namespace threshold_gate
