// The routed experts of a layer over codes: moe.hpp with rows quantised before each product.
#pragma once

#include "moe.hpp"
#include "quantize.hpp"
#include "scaled_linear.hpp"

namespace infc {

// Packed codes, expert after expert, as in MoeWeights, and their scales [E, 2I] and [E, H].
// Biases [E, 2I] and [E, H], or null.
template <class T>
struct ScaledMoeWeights {
  const void* gate_up;
  const float* gate_up_scale;
  const void* down;
  const float* down_scale;
  const T* gate_up_bias;
  const T* down_bias;
};

// What moe needs, then codes and scales of the tokens [T, H] and of what enters the second product
// [T*K, I].
template <class T>
struct ScaledMoeScratch {
  static constexpr int64_t align(int64_t bytes) { return MoeScratch<T>::align(bytes); }
  // Scales of a row of so many elements, at most.
  static constexpr int64_t scales(int64_t dim) { return ceil_div(dim, kGroup); }
  static constexpr int64_t bytes(const MoeShape& s) {
    const int64_t n = s.T * s.K;
    return MoeScratch<T>::bytes(s) + align(s.T * s.H) + align(s.T * scales(s.H) * 4) +
           align(n * s.I) + align(n * scales(s.I) * 4);
  }
  ScaledMoeScratch(void* base, const MoeShape& s) : plain(base, s) {
    const int64_t n = s.T * s.K;
    char* p = static_cast<char*>(base) + MoeScratch<T>::bytes(s);
    const auto take = [&p](int64_t size) {
      char* at = p;
      p += align(size);
      return at;
    };
    x = reinterpret_cast<int8_t*>(take(s.T * s.H));
    x_scale = reinterpret_cast<float*>(take(s.T * scales(s.H) * 4));
    gated = reinterpret_cast<int8_t*>(take(n * s.I));
    gated_scale = reinterpret_cast<float*>(take(n * scales(s.I) * 4));
    result = reinterpret_cast<T*>(plain.result);
  }
  MoeScratch<T> plain;
  int8_t* x;
  float* x_scale;
  int8_t* gated;       // rows in expert order
  float* gated_scale;
  T* result;           // [T*K, H], rows in expert order: a product of codes is rounded to T
};

template <class T>
constexpr int64_t scaled_moe_scratch_bytes(const MoeShape& s) {
  return ScaledMoeScratch<T>::bytes(s);
}

// One of an expert's matrices: [E][N, K] packed, scales and bias [E, N].
template <class T>
struct ExpertMatrix {
  const void* packed;
  const float* scale;
  const T* bias;
  int64_t N;
  int64_t K;
};

// For each expert, its rows of codes by its matrix; source(i) says which row of `codes` [.., K] and
// `row_scale` (one or more for each) is the i-th in expert order, out receives [T*K, N].
template <class W, class T, class Source>
void expert_scaled_linear(const Team& t, const int32_t* starts, int64_t E,
                          const ExpertMatrix<T>& w, const int8_t* codes, const float* row_scale,
                          Source source, T* out) {
  constexpr int kNR = LinearLayout<W>::kNR;
  using Scales = RowScales<W>;
  const int64_t count = Scales::count(w.K);
  const OutputScale<T> outputs{w.scale, w.bias};
  for_each_expert_share<W>(t, starts, E, w.N, [&](int64_t e, int64_t begin, int64_t end) {
    const char* expert = static_cast<const char*>(w.packed) + e * packed_bytes<W>(w.N, w.K);
    Product<W>(t, expert, w.K)
        .run(
            starts[e], starts[e + 1], begin, end,
            [&](int64_t i) {
              return Scales::row(codes + source(i) * w.K, row_scale + source(i) * count);
            },
            [&](int64_t i, int64_t panel, const auto* sums) {
              const int64_t n = panel * kNR;
              Scales::write(sums, row_scale + source(i) * count, outputs.from(e * w.N + n),
                            out + i * w.N + n, w.N - n < kNR ? w.N - n : kNR);
            });
  });
}

// As moe, with codes: rows of x are quantised, and those of the gated activation once they are
// rounded to T; both products are scaled_linear<W> with results of type T. `scratch` is shared by
// the team, 64-byte aligned, scaled_moe_scratch_bytes<T>(shape) long; each thread needs
// product_scratch_bytes of both products. Barriers inside, none at the end.
template <class W, class Gate, class T, class Id, class TW>
void scaled_moe(const Team& t, const Gate& gate, const T* x, int64_t ldx, const Id* index,
                const TW* weight, const ScaledMoeWeights<T>& w, T* y, int64_t ldy,
                const MoeShape& shape, void* scratch) {
  const ScaledMoeScratch<T> s(scratch, shape);
  const MoeScratch<T>& p = s.plain;
  const int64_t n = shape.T * shape.K;
  RowScales<W>::quantize(t, x, ldx, s.x, s.x_scale, shape.T, shape.H);
  if (t.tid == 0) group_by_expert(p, index, shape);
  t.barrier();
  const ExpertMatrix<T> into{w.gate_up, w.gate_up_scale, w.gate_up_bias, 2 * shape.I, shape.H};
  expert_scaled_linear<W>(
      t, p.starts, shape.E, into, s.x, s.x_scale, [&](int64_t i) { return p.entry[i] / shape.K; },
      p.wide);
  t.barrier();
  gated_rows(t, gate, p.wide, 2 * shape.I, p.gated, shape.I, n, shape.I);
  t.barrier();
  RowScales<W>::quantize(t, p.gated, shape.I, s.gated, s.gated_scale, n, shape.I);
  t.barrier();
  const ExpertMatrix<T> out_of{w.down, w.down_scale, w.down_bias, shape.H, shape.I};
  expert_scaled_linear<W>(
      t, p.starts, shape.E, out_of, s.gated, s.gated_scale, [](int64_t i) { return i; }, s.result);
  t.barrier();
  sum_slots(t, s.result, p.place, weight, y, ldy, shape);
}

}  // namespace infc
