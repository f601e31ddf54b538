// The routed experts of a layer: rows grouped by expert, then linear, gate, linear, weighted sum.
#pragma once

#include "activations.hpp"
#include "linear.hpp"

namespace infc {

// Sizes of a mixture layer: T tokens, E experts, hidden size H, expert size I, K experts a token.
struct MoeShape {
  int64_t T;
  int64_t E;
  int64_t H;
  int64_t I;
  int64_t K;
};

// Packed weights, expert after expert: gate_up [E][2I, H] and down [E][H, I], each expert packed as
// a linear weight. Biases [E, 2I] and [E, H], or null, are of the rows' type T.
template <class T>
struct MoeWeights {
  const void* gate_up;
  const void* down;
  const T* gate_up_bias;
  const T* down_bias;
};

// Where the intermediate values lie in the scratch that the caller's arena gives.
template <class T>
struct MoeScratch {
  static constexpr int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static constexpr int64_t bytes(const MoeShape& s) {
    const int64_t n = s.T * s.K;
    return align(n * s.H * 4) + align(n * 2 * s.I * static_cast<int64_t>(sizeof(T))) +
           align(n * s.I * static_cast<int64_t>(sizeof(T))) + align(n * 4) + align(n * 4) +
           align((s.E + 1) * 4);
  }
  MoeScratch(void* base, const MoeShape& s) {
    const int64_t n = s.T * s.K;
    char* p = static_cast<char*>(base);
    const auto take = [&p](int64_t size) {
      char* at = p;
      p += align(size);
      return at;
    };
    result = reinterpret_cast<float*>(take(n * s.H * 4));
    wide = reinterpret_cast<T*>(take(n * 2 * s.I * static_cast<int64_t>(sizeof(T))));
    gated = reinterpret_cast<T*>(take(n * s.I * static_cast<int64_t>(sizeof(T))));
    entry = reinterpret_cast<int32_t*>(take(n * 4));
    place = reinterpret_cast<int32_t*>(take(n * 4));
    starts = reinterpret_cast<int32_t*>(take((s.E + 1) * 4));
  }
  float* result;    // [T*K, H], rows in expert order
  T* wide;          // [T*K, 2I]
  T* gated;         // [T*K, I]
  int32_t* entry;   // expert order → token * K + slot
  int32_t* place;   // token * K + slot → expert order
  int32_t* starts;  // [E + 1]
};

// Bytes of scratch that moe needs for at most `T` tokens.
template <class T>
constexpr int64_t moe_scratch_bytes(const MoeShape& s) {
  return MoeScratch<T>::bytes(s);
}

// Sorts the (token, slot) pairs by expert, keeping their order within one.
template <class T, class Id>
void group_by_expert(const MoeScratch<T>& s, const Id* index, const MoeShape& shape) {
  const int64_t n = shape.T * shape.K;
  for (int64_t e = 0; e <= shape.E; ++e) s.starts[e] = 0;
  for (int64_t i = 0; i < n; ++i) ++s.starts[index[i] + 1];
  for (int64_t e = 0; e < shape.E; ++e) s.starts[e + 1] += s.starts[e];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t at = s.starts[index[i]]++;
    s.place[i] = at;
    s.entry[at] = static_cast<int32_t>(i);
  }
  for (int64_t e = shape.E; e > 0; --e) s.starts[e] = s.starts[e - 1];
  s.starts[0] = 0;
}

// Calls f(expert, first panel, last panel) for this thread's share of the experts that have rows,
// which `starts` bounds, by the panels of N outputs. Threads share (expert, panel) by the number of
// tiles and panels read.
template <class W, class F>
INFC_INLINE void for_each_expert_share(const Team& t, const int32_t* starts, int64_t E, int64_t N,
                                       F f) {
  const int64_t panels = ceil_div(N, LinearLayout<W>::kNR);
  const auto cost = [&](int64_t e) {
    return ceil_div(starts[e + 1] - starts[e], LinearLayout<W>::kMR);
  };
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += cost(e) * panels;
  const Share share = share_of(t, total);
  int64_t at = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (starts[e + 1] == starts[e]) continue;
    // A panel belongs to the thread in whose share its cost begins.
    const auto panel_at = [&](int64_t place) {
      if (place <= at) return int64_t{0};
      const int64_t p = ceil_div(place - at, cost(e));
      return p < panels ? p : panels;
    };
    f(e, panel_at(share.begin), panel_at(share.end));
    at += cost(e) * panels;
  }
}

// For each expert, its rows by its weight [N, K] of type W; row(i) gives the i-th row in expert
// order, out receives [T*K, N].
template <class W, class T, class TY, class RowAt>
void expert_linear(const Team& t, const int32_t* starts, int64_t E, const void* packed,
                   const T* bias, int64_t N, int64_t K, RowAt row, TY* out) {
  constexpr int kNR = LinearLayout<W>::kNR;
  for_each_expert_share<W>(t, starts, E, N, [&](int64_t e, int64_t begin, int64_t end) {
    const char* expert = static_cast<const char*>(packed) + e * packed_bytes<W>(N, K);
    Product<W>(t, expert, K)
        .run(starts[e], starts[e + 1], begin, end, row,
             [&](int64_t i, int64_t panel, const float* sums) {
               const int64_t n = panel * kNR;
               write_sums(sums, bias == nullptr ? bias : bias + e * N + n, out + i * N + n,
                          N - n < kNR ? N - n : kNR);
             });
  });
}

// y [T, H] (row stride ldy): the sum over slots k = 0, 1, ... of fma(weight, part, acc) in float,
// rounded once; parts [T*K, H] lie in expert order, place says where.
template <class T, class TP, class TW>
void sum_slots(const Team& t, const TP* parts, const int32_t* place, const TW* weight, T* y,
               int64_t ldy, const MoeShape& shape) {
  const Share share = share_of(t, shape.T);
  for (int64_t token = share.begin; token < share.end; ++token) {
    for_each_group(shape.H, [&](int64_t i, int64_t count) {
      f32x16 acc = zeros();
      for (int64_t k = 0; k < shape.K; ++k) {
        const TP* part = parts + place[token * shape.K + k] * shape.H;
        acc = fma(set1(to_float(weight[token * shape.K + k])), load_group(part + i, count), acc);
      }
      store_group(y + token * ldy + i, acc, count);
    });
  }
}

// x [T, H] (row stride ldx), index [T, K] in [0, E), weight [T, K] → y [T, H] (row stride ldy):
// the sum over slots k = 0, 1, ... of fma(weight, expert(x), acc) in float, rounded once. `scratch`
// is shared by the team, 64-byte aligned, moe_scratch_bytes<T>(shape) long; each thread needs
// product_scratch_bytes of both products. `gate` joins the two halves of an expert's first product.
// Weights are of type W; rows meet them as in linear. Barriers inside, none at the end.
template <class W, class Gate, class T, class Id, class TW>
void moe(const Team& t, const Gate& gate, const T* x, int64_t ldx, const Id* index,
         const TW* weight, const MoeWeights<T>& w, T* y, int64_t ldy, const MoeShape& shape,
         void* scratch) {
  const MoeScratch<T> s(scratch, shape);
  const int64_t n = shape.T * shape.K;
  if (t.tid == 0) group_by_expert(s, index, shape);
  t.barrier();
  expert_linear<W>(
      t, s.starts, shape.E, w.gate_up, w.gate_up_bias, 2 * shape.I, shape.H,
      [&](int64_t i) { return x + s.entry[i] / shape.K * ldx; }, s.wide);
  t.barrier();
  gated_rows(t, gate, s.wide, 2 * shape.I, s.gated, shape.I, n, shape.I);
  t.barrier();
  expert_linear<W>(
      t, s.starts, shape.E, w.down, w.down_bias, shape.H, shape.I,
      [&](int64_t i) { return s.gated + i * shape.I; }, s.result);
  t.barrier();
  sum_slots(t, s.result, s.place, weight, y, ldy, shape);
}

}  // namespace infc
