// C entry points over products of rows of ELEMENT by codes: see wrapper.cpp.
#include <algorithm>

#include "kernels/decoded_linear.hpp"
#include "kernels/scaled_embedding.hpp"

using Int8 = Decoded<Grouped<8, int8_t>>;
using Int6 = Decoded<Grouped<6, int8_t>>;
using Int4 = Decoded<Grouped<4, int8_t, absent, Levels::book>>;
using Int4G64 = Decoded<Grouped<4, int8_t, absent, Levels::book, 2>>;
using Int4G128 = Decoded<Grouped<4, int8_t, absent, Levels::book, 4>>;
using Q8_0 = Decoded<Grouped<8, half>>;
using Q4_0 = Decoded<Grouped<4, half>>;
using Q4_1 = Decoded<Grouped<4, half, half, Levels::counted>>;

#define DECODED_LINEAR(NAME, W)                                                                     \
  EXPORT void NAME(void* team, const T* x, i64 ldx, const void* w, const float* scale,              \
                   const T* bias, T* y, i64 ldy, i64 M, i64 N, i64 K) {                             \
    on_team(team, [=](const Team& t) {                                                              \
      decoded_linear<W, T, T>(t, x, ldx, w, scale, bias, y, ldy, M, N, K);                          \
    });                                                                                             \
  }
DECODED_LINEAR(decoded_linear_int8_weights, Int8)
DECODED_LINEAR(decoded_linear_int6_weights, Int6)
DECODED_LINEAR(decoded_linear_int4_weights, Int4)
DECODED_LINEAR(decoded_linear_int4_g64_weights, Int4G64)
DECODED_LINEAR(decoded_linear_int4_g128_weights, Int4G128)
DECODED_LINEAR(decoded_linear_q8_0_weights, Q8_0)
DECODED_LINEAR(decoded_linear_q4_0_weights, Q4_0)
DECODED_LINEAR(decoded_linear_q4_1_weights, Q4_1)
EXPORT i64 linear_scratch(i64 K) {
  return std::max({product_scratch_bytes<Int8>(K), product_scratch_bytes<Int4>(K),
                   product_scratch_bytes<Q8_0>(K), product_scratch_bytes<Q4_0>(K),
                   product_scratch_bytes<Q4_1>(K), product_scratch_bytes<Int4G64>(K),
                   product_scratch_bytes<Int4G128>(K), product_scratch_bytes<Int6>(K)});
}

EXPORT void scaled_embedding_int4_weights(void* team, const void* table, const float* scale,
                                          const int32_t* ids, T* y, i64 rows, i64 dim) {
  on_team(team, [=](const Team& t) { scaled_embedding<Int4>(t, table, scale, ids, y, rows, dim); });
}

EXPORT i64 moe_scratch(i64 tokens, i64 E, i64 H, i64 I, i64 K) {
  return moe_scratch_bytes<T>(MoeShape{tokens, E, H, I, K});
}
#define EXPERTS(NAME, W)                                                                            \
  EXPORT void NAME(void* team, const T* x, i64 ldx, const i64* index, const T* weight,              \
                   const void* gate_up, const float* gate_up_scale, const void* down,               \
                   const float* down_scale, const T* up_bias, const T* down_bias, T* y, i64 ldy,    \
                   i64 tokens, i64 E, i64 H, i64 I, i64 K, void* scratch) {                         \
    const ScaledMoeWeights<T> w{gate_up, gate_up_scale, down, down_scale, up_bias, down_bias};      \
    const MoeShape shape{tokens, E, H, I, K};                                                       \
    on_team(team, [=](const Team& t) {                                                              \
      decoded_moe<W>(t, PlainGate<Act::silu>{}, x, ldx, index, weight, w, y, ldy, shape, scratch);  \
    });                                                                                             \
  }
EXPERTS(experts_int8_weights, Int8)
EXPERTS(experts_q4_1_weights, Q4_1)
