// C entry points over the kernel templates for codes, for one element type, ELEMENT: see wrapper.cpp.
#include <algorithm>

#include "kernels/quantize.hpp"
#include "kernels/scaled_embedding.hpp"
#include "kernels/scaled_linear.hpp"
#include "kernels/scaled_moe.hpp"

EXPORT void layout(i64* out) {
  out[0] = LinearLayout<int8_t>::kNR;
  out[1] = LinearLayout<int8_t>::kKP;
  out[2] = INFC_VNNI;
  out[3] = LinearLayout<int4x2>::kNR;
}

EXPORT void quantize(void* team, const T* x, i64 ldx, int8_t* q, float* scale, i64 rows, i64 dim) {
  on_team(team, [=](const Team& t) { quantize_rows(t, x, ldx, q, scale, rows, dim); });
}

#define SCALED_LINEAR(NAME, W, TY)                                                                  \
  EXPORT void NAME(void* team, const int8_t* q, i64 ldq, const float* row_scale, const void* w,     \
                   const float* scale, const T* bias, TY* y, i64 ldy, i64 M, i64 N, i64 K) {        \
    on_team(team, [=](const Team& t) {                                                              \
      scaled_linear<W, TY>(t, q, ldq, row_scale, w, scale, bias, y, ldy, M, N, K);                  \
    });                                                                                             \
  }
using Int8 = Grouped<8, int8_t>;
using Int6 = Grouped<6, int8_t>;
using Int4 = Grouped<4, int8_t, absent, Levels::book>;
using Int4G64 = Grouped<4, int8_t, absent, Levels::book, 2>;
using Int4G128 = Grouped<4, int8_t, absent, Levels::book, 4>;
using Q8_0 = Grouped<8, half>;
using Q4_0 = Grouped<4, half>;
using Q4_1 = Grouped<4, half, half, Levels::counted>;
SCALED_LINEAR(scaled_linear_int8_token, int8_t, T)
SCALED_LINEAR(scaled_linear_int8_token_float, int8_t, float)
SCALED_LINEAR(scaled_linear_int4_token, int4x2, T)
SCALED_LINEAR(scaled_linear_int4_token_float, int4x2, float)
SCALED_LINEAR(scaled_linear_int8, Int8, T)
SCALED_LINEAR(scaled_linear_int8_float, Int8, float)
SCALED_LINEAR(scaled_linear_int6, Int6, T)
SCALED_LINEAR(scaled_linear_int6_float, Int6, float)
SCALED_LINEAR(scaled_linear_int4, Int4, T)
SCALED_LINEAR(scaled_linear_int4_float, Int4, float)
SCALED_LINEAR(scaled_linear_int4_g64, Int4G64, T)
SCALED_LINEAR(scaled_linear_int4_g64_float, Int4G64, float)
SCALED_LINEAR(scaled_linear_int4_g128, Int4G128, T)
SCALED_LINEAR(scaled_linear_int4_g128_float, Int4G128, float)
SCALED_LINEAR(scaled_linear_q8_0, Q8_0, T)
SCALED_LINEAR(scaled_linear_q8_0_float, Q8_0, float)
SCALED_LINEAR(scaled_linear_q4_0, Q4_0, T)
SCALED_LINEAR(scaled_linear_q4_0_float, Q4_0, float)
SCALED_LINEAR(scaled_linear_q4_1, Q4_1, T)
SCALED_LINEAR(scaled_linear_q4_1_float, Q4_1, float)
#define SCALED_EMBEDDING(NAME, W)                                                                   \
  EXPORT void NAME(void* team, const void* table, const float* scale, const int32_t* ids, T* y,     \
                   i64 rows, i64 dim) {                                                             \
    on_team(team, [=](const Team& t) { scaled_embedding<W>(t, table, scale, ids, y, rows, dim); }); \
  }
SCALED_EMBEDDING(scaled_embedding_int8_token, int8_t)
SCALED_EMBEDDING(scaled_embedding_int4_token, int4x2)
SCALED_EMBEDDING(scaled_embedding_int8, Int8)
SCALED_EMBEDDING(scaled_embedding_int6, Int6)
SCALED_EMBEDDING(scaled_embedding_int4, Int4)
SCALED_EMBEDDING(scaled_embedding_int4_g64, Int4G64)
SCALED_EMBEDDING(scaled_embedding_int4_g128, Int4G128)
SCALED_EMBEDDING(scaled_embedding_q8_0, Q8_0)
SCALED_EMBEDDING(scaled_embedding_q4_0, Q4_0)
SCALED_EMBEDDING(scaled_embedding_q4_1, Q4_1)
EXPORT i64 linear_scratch(i64 K) {
  return std::max({product_scratch_bytes<int8_t>(K), product_scratch_bytes<int4x2>(K),
                   product_scratch_bytes<Int8>(K), product_scratch_bytes<Int4>(K),
                   product_scratch_bytes<Q8_0>(K), product_scratch_bytes<Q4_0>(K),
                   product_scratch_bytes<Q4_1>(K), product_scratch_bytes<Int4G64>(K),
                   product_scratch_bytes<Int4G128>(K), product_scratch_bytes<Int6>(K)});
}
EXPORT void quantize_groups(void* team, const T* x, i64 ldx, int8_t* q, float* scale, i64 rows,
                            i64 dim) {
  on_team(team, [=](const Team& t) { quantize_row_groups(t, x, ldx, q, scale, rows, dim); });
}

EXPORT i64 layer_bytes(i64 G, i64 D, i64 Dv, i64 block_size) {
  return kv_layer_bytes<int8_t>(G, D, Dv, block_size);
}
EXPORT void rope_heads(void* team, const T* x, i64 ldx, T* y, i64 ldy, const float* cos,
                       const float* sin, i64 rotary, i64 heads, i64 dim,
                       i64 tokens) {
  on_team(team, [=](const Team& t) {
    rope(t, x, ldx, y, ldy, cos, sin, rotary, RopeStyle::half, heads, dim, tokens);
  });
}
EXPORT void write_kv(void* team, const T* k, i64 ldk, const T* v, i64 ldv, const int32_t* slots,
                     i64 tokens, const i64* kv) {
  on_team(team, [=](const Team& t) {
    kv_write<T, int8_t>(t, k, ldk, v, ldv, slots, tokens, view(kv));
  });
}
EXPORT void rope_write_kv(void* team, const T* q, i64 ldq, T* q_out, i64 ldq_out, const T* k,
                          i64 ldk, const T* v, i64 ldv, const float* cos,
                          const float* sin, i64 rotary, i64 H, const i64* kv, const int32_t* slots,
                          i64 tokens) {
  on_team(team, [=](const Team& t) {
    rope_kv_write<T, int8_t>(t, q, ldq, q_out, ldq_out, k, ldk, v, ldv, cos, sin, rotary,
                             RopeStyle::half, H, view(kv), slots, tokens);
  });
}

EXPORT void attend(void* team, const T* q, i64 ldq, T* y, i64 ldy, const int32_t* query_starts,
                   const int32_t* positions, const int32_t* block_table, i64 table_width, i64 B,
                   i64 tokens, const i64* kv, i64 H, double scale, i64 window, double softcap,
                   const float* sinks) {
  const StepView step{query_starts, positions, block_table, table_width, B, tokens};
  on_team(team, [=](const Team& t) {
    paged_attention<T, int8_t>(t, q, ldq, y, ldy, step, view(kv), H, static_cast<float>(scale),
                               window, static_cast<float>(softcap), sinks);
  });
}

EXPORT i64 moe_scratch(i64 tokens, i64 E, i64 H, i64 I, i64 K) {
  return scaled_moe_scratch_bytes<T>(MoeShape{tokens, E, H, I, K});
}
#define EXPERTS(NAME, W)                                                                            \
  EXPORT void NAME(void* team, const T* x, i64 ldx, const i64* index, const T* weight,              \
                   const void* gate_up, const float* gate_up_scale, const void* down,               \
                   const float* down_scale, const T* up_bias, const T* down_bias, T* y, i64 ldy,    \
                   i64 tokens, i64 E, i64 H, i64 I, i64 K, void* scratch) {                         \
    const ScaledMoeWeights<T> w{gate_up, gate_up_scale, down, down_scale, up_bias, down_bias};      \
    const MoeShape shape{tokens, E, H, I, K};                                                       \
    on_team(team, [=](const Team& t) {                                                              \
      scaled_moe<W>(t, PlainGate<Act::silu>{}, x, ldx, index, weight, w, y, ldy, shape, scratch);   \
    });                                                                                             \
  }
EXPERTS(experts_int8_token, int8_t)
EXPERTS(experts_int4_token, int4x2)
EXPERTS(experts_int8, Int8)
EXPERTS(experts_int4, Int4)
EXPERTS(experts_int4_g128, Int4G128)
