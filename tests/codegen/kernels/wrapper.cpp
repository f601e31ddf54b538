// C entry points over the kernel templates, for one element type, ELEMENT.
// Every argument is a pointer, an int64_t or a double: harness.py calls them without signatures.
#include "kernels/embedding.hpp"
#include "kernels/linear.hpp"
#include "kernels/moe.hpp"
#include "kernels/norms.hpp"
#include "kernels/panels_ahead.hpp"
#include "kernels/rows.hpp"

// Each thread adds its number to a cell of its own, waits, and sums all cells, `rounds` times.
EXPORT void team_count(void* team, i64 rounds, i64* cells, i64* sums) {
  on_team(team, [=](const Team& t) {
    for (i64 i = 0; i < rounds; ++i) {
      cells[8 * t.tid] += t.tid + i;
      t.barrier();
      for (int j = 0; j < t.size; ++j) sums[t.tid] += cells[8 * j];
      t.barrier();
    }
  });
}

// As team_count; out[0] counts what thread 0 did while it waited for the others.
EXPORT void team_wait(void* team, i64 microseconds, i64* out) {
  on_team(team, [=](const Team& t) {
    i64 calls = 0;
    const auto count = [&calls] { ++calls; };
    const i64 end = nanoseconds_now() + (t.tid == 0 ? 0 : microseconds * 1000);
    while (nanoseconds_now() < end) {
    }
    t.barrier(count);
    if (t.tid == 0) out[0] = calls;
  });
}

// What thread `tid` of `threads` asks for ahead: first byte, bytes between streams, bytes of each,
// streams; and the bytes of all panels.
EXPORT void ahead(i64 tid, i64 threads, i64 M, i64 N, i64 K, i64* out) {
  const Team t{static_cast<int>(tid), static_cast<int>(threads), nullptr, 0, nullptr};
  const char* packed = reinterpret_cast<const char*>(uintptr_t{1} << 20);
  const PanelsAhead found = panels_ahead<T>(t, packed, M, N, K);
  out[0] = found.left > 0 ? found.at - packed : 0;
  out[1] = found.apart;
  out[2] = found.left;
  out[3] = found.streams;
  out[4] = ceil_div(N, LinearLayout<T>::kNR) * panel_bytes<T>(K);
}

EXPORT void layout(i64* out) {
  out[0] = LinearLayout<T>::kNR;
  out[1] = LinearLayout<T>::kKP;
}

EXPORT i64 linear_scratch(i64 K) { return product_scratch_bytes<T>(K); }
EXPORT void linear_same(void* team, const T* x, i64 ldx, const void* w, const T* bias, T* y,
                        i64 ldy, i64 M, i64 N, i64 K) {
  on_team(team, [=](const Team& t) { linear<T, T, T>(t, x, ldx, w, bias, y, ldy, M, N, K); });
}
EXPORT void linear_float(void* team, const T* x, i64 ldx, const void* w, const T* bias, float* y,
                         i64 ldy, i64 M, i64 N, i64 K) {
  on_team(team, [=](const Team& t) { linear<T, T, float>(t, x, ldx, w, bias, y, ldy, M, N, K); });
}

EXPORT void linear_rounding(void* team, const float* x, i64 ldx, const void* w, const float* bias,
                            float* y, i64 ldy, i64 M, i64 N, i64 K) {
  on_team(team,
          [=](const Team& t) { linear<float, T, float>(t, x, ldx, w, bias, y, ldy, M, N, K); });
}

EXPORT void rms_norm_rows(void* team, i64 round_first, const T* x, i64 ldx, const T* w, T* y,
                          i64 ldy, i64 outer, i64 inner, i64 dim, double eps) {
  const float e = static_cast<float>(eps);
  on_team(team, [=](const Team& t) {
    if (round_first != 0) {
      rms_norm<true>(t, x, ldx, w, y, ldy, outer, inner, dim, e);
    } else {
      rms_norm<false>(t, x, ldx, w, y, ldy, outer, inner, dim, e);
    }
  });
}
EXPORT void add_rms_norm_rows(void* team, const T* x, const T* residual, const float* w, T* y,
                              T* sum, i64 rows, i64 dim, double eps) {
  on_team(team, [=](const Team& t) {
    add_rms_norm<true>(t, x, residual, w, y, sum, rows, dim, static_cast<float>(eps));
  });
}
EXPORT void layer_norm_rows(void* team, const T* x, i64 ldx, const T* w, const T* b, T* y,
                            i64 rows, i64 dim, double eps) {
  on_team(team, [=](const Team& t) {
    layer_norm(t, x, ldx, w, b, y, rows, dim, static_cast<float>(eps));
  });
}
EXPORT void add_layer_norm_rows(void* team, const T* x, const T* residual, const T* w, const T* b,
                                T* y, T* sum, i64 rows, i64 dim, double eps) {
  on_team(team, [=](const Team& t) {
    add_layer_norm(t, x, residual, w, b, y, sum, rows, dim, static_cast<float>(eps));
  });
}

// Results of another type than the rows: of float rows, each in T (y) and in float (wide).
EXPORT void rounded_results(void* team, const float* x, const float* w, T* y, float* wide,
                            float* sum, i64 rows, i64 dim, double eps) {
  const float e = static_cast<float>(eps);
  on_team(team, [=](const Team& t) {
    const i64 size = rows * dim;
    add_rms_norm<true>(t, x, x, w, y, sum, rows, dim, e);
    add_rms_norm<true>(t, x, x, w, wide, sum, rows, dim, e);
    rms_norm<true>(t, x, dim, w, y + size, rows, dim, e);
    rms_norm<true>(t, x, dim, w, wide + size, rows, dim, e);
    layer_norm(t, x, dim, w, w, y + 2 * size, rows, dim, e);
    layer_norm(t, x, dim, w, w, wide + 2 * size, rows, dim, e);
    add_layer_norm(t, x, x, w, w, y + 3 * size, sum, rows, dim, e);
    add_layer_norm(t, x, x, w, w, wide + 3 * size, sum, rows, dim, e);
    gated_act<Act::silu>(t, x, 2 * dim, y + 4 * size, dim, rows / 2, dim);
    gated_act<Act::silu>(t, x, 2 * dim, wide + 4 * size, dim, rows / 2, dim);
  });
}

EXPORT void embed_plain(void* team, const T* table, const i64* ids, T* y, i64 rows, i64 dim) {
  on_team(team, [=](const Team& t) { embedding_rows<T>(t, table, ids, y, rows, dim); });
}
EXPORT void embed_packed(void* team, const void* table, const int32_t* ids, T* y, i64 rows,
                         i64 dim) {
  on_team(team, [=](const Team& t) { embedding_packed<T>(t, table, ids, y, rows, dim); });
}
EXPORT void take(void* team, const T* x, i64 ldx, const int32_t* index, T* y, i64 ldy, i64 rows,
                 i64 dim) {
  on_team(team, [=](const Team& t) { take_rows<T>(t, x, ldx, index, y, ldy, rows, dim); });
}

EXPORT void rotary_rows(void* team, const int32_t* positions, const float* frequencies, double scale,
                        float* y, i64 tokens, i64 width, i64 quarters) {
  on_team(team, [=](const Team& t) {
    rotary(t, positions, frequencies, static_cast<float>(scale), y, tokens, width, quarters);
  });
}
EXPORT void rope_heads(void* team, const T* x, i64 ldx, T* y, i64 ldy, const float* cos,
                       const float* sin, i64 rotary, i64 interleaved, i64 heads,
                       i64 dim, i64 tokens) {
  const RopeStyle style = interleaved != 0 ? RopeStyle::interleaved : RopeStyle::half;
  on_team(team, [=](const Team& t) {
    rope(t, x, ldx, y, ldy, cos, sin, rotary, style, heads, dim, tokens);
  });
}
EXPORT void write_kv(void* team, const T* k, i64 ldk, const T* v, i64 ldv, const int32_t* slots,
                     i64 tokens, const i64* kv) {
  on_team(team, [=](const Team& t) { kv_write<T, T>(t, k, ldk, v, ldv, slots, tokens, view(kv)); });
}
EXPORT void rope_write_kv(void* team, const T* q, i64 ldq, T* q_out, i64 ldq_out, const T* k,
                          i64 ldk, const T* v, i64 ldv, const float* cos,
                          const float* sin, i64 rotary, i64 interleaved, i64 H, const i64* kv,
                          const int32_t* slots, i64 tokens) {
  const RopeStyle style = interleaved != 0 ? RopeStyle::interleaved : RopeStyle::half;
  on_team(team, [=](const Team& t) {
    rope_kv_write<T, T>(t, q, ldq, q_out, ldq_out, k, ldk, v, ldv, cos, sin, rotary,
                        style, H, view(kv), slots, tokens);
  });
}
EXPORT void copy_kv(void* team, const i64* kv, const int32_t* pairs, i64 count) {
  on_team(team, [=](const Team& t) { copy_blocks(t, view(kv), pairs, count); });
}

EXPORT void attend(void* team, const T* q, i64 ldq, T* y, i64 ldy, const int32_t* query_starts,
                   const int32_t* positions, const int32_t* block_table, i64 table_width, i64 B,
                   i64 tokens, const i64* kv, i64 H, double scale, i64 window, double softcap,
                   const float* sinks) {
  const StepView step{query_starts, positions, block_table, table_width, B, tokens};
  on_team(team, [=](const Team& t) {
    paged_attention<T, T>(t, q, ldq, y, ldy, step, view(kv), H, static_cast<float>(scale), window,
                          static_cast<float>(softcap), sinks);
  });
}

EXPORT void gate(void* team, i64 act, const T* x, i64 ldx, T* y, i64 ldy, i64 rows, i64 I) {
  on_team(team, [=](const Team& t) {
    switch (static_cast<Act>(act)) {
      case Act::silu: return gated_act<Act::silu>(t, x, ldx, y, ldy, rows, I);
      case Act::gelu: return gated_act<Act::gelu>(t, x, ldx, y, ldy, rows, I);
      case Act::gelu_tanh: return gated_act<Act::gelu_tanh>(t, x, ldx, y, ldy, rows, I);
      case Act::relu: return gated_act<Act::relu>(t, x, ldx, y, ldy, rows, I);
    }
  });
}
EXPORT void softmax(void* team, const T* x, i64 ldx, T* y, i64 ldy, i64 rows, i64 dim) {
  on_team(team, [=](const Team& t) { softmax_rows<T, T>(t, x, ldx, y, ldy, rows, dim); });
}
EXPORT void topk(void* team, const T* x, i64 ldx, T* values, i64* indices, i64 rows, i64 dim,
                 i64 k) {
  on_team(team, [=](const Team& t) { topk_rows<T>(t, x, ldx, values, indices, rows, dim, k); });
}
EXPORT void pick(void* team, const T* x, i64 ldx, const i64* index, T* y, i64 rows, i64 count) {
  on_team(team, [=](const Team& t) { gather_rows(t, x, ldx, index, y, rows, count); });
}
EXPORT void put(void* team, const T* x, i64 ldx, const i64* index, T* y, i64 rows, i64 dim,
                i64 count, double value) {
  const float v = static_cast<float>(value);
  on_team(team, [=](const Team& t) { scatter_rows(t, x, ldx, index, y, rows, dim, count, v); });
}

// Experts of weights of type T for rows of type X, which is that or float.
// `limit` 0 is the plain gate; biases may be null.
#define EXPERTS(NAME, X)                                                                          \
  EXPORT i64 NAME##_scratch(i64 tokens, i64 E, i64 H, i64 I, i64 K) {                             \
    return moe_scratch_bytes<X>(MoeShape{tokens, E, H, I, K});                                    \
  }                                                                                               \
  EXPORT void NAME(void* team, const X* x, i64 ldx, const i64* index, const X* weight,            \
                   const void* gate_up, const void* down, const X* up_bias, const X* down_bias,   \
                   double alpha, double limit, double shift, X* y, i64 ldy, i64 tokens, i64 E,    \
                   i64 H, i64 I, i64 K, void* scratch) {                                          \
    const MoeWeights<X> w{gate_up, down, up_bias, down_bias};                                     \
    const MoeShape shape{tokens, E, H, I, K};                                                     \
    const LimitedGate<Act::silu> limited{static_cast<float>(alpha), static_cast<float>(limit),    \
                                         static_cast<float>(shift)};                              \
    on_team(team, [=](const Team& t) {                                                            \
      if (limit > 0) return moe<T>(t, limited, x, ldx, index, weight, w, y, ldy, shape, scratch); \
      moe<T>(t, PlainGate<Act::silu>{}, x, ldx, index, weight, w, y, ldy, shape, scratch);        \
    });                                                                                           \
  }
EXPERTS(experts, T)
EXPERTS(experts_rounding, float)

#ifdef WITH_MATH
namespace {
// f over an array twice: one element at a time, and sixteen at a time.
template <class S, class W>
void both(const float* x, float* one, float* many, i64 n, S scalar, W vector) {
  for (i64 i = 0; i < n; ++i) one[i] = scalar(x[i]);
  for_each_group(n, [&](i64 i, i64 c) { store_group(many + i, vector(load_group(x + i, c)), c); });
}
}  // namespace
#define BOTH(NAME)                                                                \
  EXPORT void math_##NAME(const float* x, float* one, float* many, i64 n) {       \
    both(x, one, many, n, [](float v) { return infc::NAME(v); },                  \
         [](const f32x16& v) { return infc::NAME(v); });                          \
  }
BOTH(exp)
BOTH(tanh)
BOTH(sigmoid)
BOTH(silu)
BOTH(erf)
BOTH(gelu)
BOTH(gelu_tanh)
BOTH(log)
BOTH(softplus)
BOTH(rsqrt)
BOTH(relu)
EXPORT void math_bf16(const float* x, bf16* one, bf16* many, i64 n) {
  for (i64 i = 0; i < n; ++i) one[i] = to_bf16(x[i]);
  for_each_group(n, [&](i64 i, i64 c) { store_group(many + i, load_group(x + i, c), c); });
}
#endif
