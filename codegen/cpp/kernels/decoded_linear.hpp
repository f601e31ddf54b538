// y = (x · Wᵀ) * scales + bias for rows of floats over packed weights of few bits; experts too.
#pragma once

#include "moe.hpp"
#include "scaled_moe.hpp"

namespace infc {

// x [M, K] (row stride ldx) of float or bf16, packed_w from [N, K] with scale [N], bias [N] or null,
// y [M, N] (row stride ldy). An element is the sum of linear_decoded_tile.hpp times scale, plus the
// bias, rounded once to TY. W is a Decoded. Needs product_scratch_bytes<W>(K) of scratch on each
// thread. No barrier inside.
template <class W, class TX, class TY, class TB = TY>
void decoded_linear(const Team& t, const TX* x, int64_t ldx, const void* packed_w,
                    const float* scale, const TB* bias, TY* y, int64_t ldy, int64_t M, int64_t N,
                    int64_t K) {
  constexpr int kNR = LinearLayout<W>::kNR;
  const OutputScale<TB> outputs{scale, bias};
  Product<W> product(t, packed_w, K);
  for_each_share<W>(t, M, N, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    product.run(
        first, last, begin, end, [&](int64_t i) { return x + i * ldx; },
        [&](int64_t i, int64_t panel, const float* sums) {
          const int64_t n = panel * kNR;
          write_scaled(sums, outputs.from(n), y + i * ldy + n, N - n < kNR ? N - n : kNR);
        });
  });
}

// For each expert, its rows by its matrix; row(i) gives the i-th row in expert order, out receives
// [T*K, N].
template <class W, class T, class RowAt>
void expert_decoded_linear(const Team& t, const int32_t* starts, int64_t E,
                           const ExpertMatrix<T>& w, RowAt row, T* out) {
  constexpr int kNR = LinearLayout<W>::kNR;
  const OutputScale<T> outputs{w.scale, w.bias};
  for_each_expert_share<W>(t, starts, E, w.N, [&](int64_t e, int64_t begin, int64_t end) {
    const char* expert = static_cast<const char*>(w.packed) + e * packed_bytes<W>(w.N, w.K);
    Product<W>(t, expert, w.K)
        .run(starts[e], starts[e + 1], begin, end, row,
             [&](int64_t i, int64_t panel, const float* sums) {
               const int64_t n = panel * kNR;
               write_scaled(sums, outputs.from(e * w.N + n), out + i * w.N + n,
                            w.N - n < kNR ? w.N - n : kNR);
             });
  });
}

// As scaled_moe, with rows that stay as they are: both products are decoded_linear<W> with results of
// type T. `scratch` is as for moe: moe_scratch_bytes<T>(shape) long.
template <class W, class Gate, class T, class Id, class TW>
void decoded_moe(const Team& t, const Gate& gate, const T* x, int64_t ldx, const Id* index,
                 const TW* weight, const ScaledMoeWeights<T>& w, T* y, int64_t ldy,
                 const MoeShape& shape, void* scratch) {
  const MoeScratch<T> s(scratch, shape);
  T* result = reinterpret_cast<T*>(s.result);  // a product is rounded to T
  if (t.tid == 0) group_by_expert(s, index, shape);
  t.barrier();
  const ExpertMatrix<T> into{w.gate_up, w.gate_up_scale, w.gate_up_bias, 2 * shape.I, shape.H};
  expert_decoded_linear<W>(
      t, s.starts, shape.E, into, [&](int64_t i) { return x + s.entry[i] / shape.K * ldx; },
      s.wide);
  t.barrier();
  gated_rows(t, gate, s.wide, 2 * shape.I, s.gated, shape.I, shape.T * shape.K, shape.I);
  t.barrier();
  const ExpertMatrix<T> out_of{w.down, w.down_scale, w.down_bias, shape.H, shape.I};
  expert_decoded_linear<W>(
      t, s.starts, shape.E, out_of, [&](int64_t i) { return s.gated + i * shape.I; }, result);
  t.barrier();
  sum_slots(t, result, s.place, weight, y, ldy, shape);
}

}  // namespace infc
