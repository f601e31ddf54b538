// The paged KV cache: where a token's keys and values lie, and the kernels that write them.
//
// A group of layers owns blocks of block_size tokens. Block b of layer l holds, at
// base + b * bytes_per_block + layer_offset, first K as [G][D][block_size] (token innermost, so
// that scores of 16 tokens are one vector), then V as [G][block_size][Dv]. A cache of codes (int8)
// goes on with the keys' scales as float [G][block_size] and then the values' likewise: a code
// stands for code * scale, with one scale a token and head (quantize.hpp).
#pragma once

#include <type_traits>

#include "quantize.hpp"
#include "rope.hpp"
#include "simd.hpp"
#include "team.hpp"

namespace infc {

// One layer's view of its group's cache. block_size is a multiple of 16.
struct KvView {
  void* base;
  int64_t bytes_per_block;
  int64_t layer_offset;  // bytes
  int32_t block_size;
  int32_t G;   // KV heads
  int32_t D;   // key head size
  int32_t Dv;  // value head size
};

// Whether a cache of this type holds codes, and scales beside them.
template <class TC>
constexpr bool kHoldsCodes = std::is_same_v<TC, int8_t>;

// Bytes of one layer's part of a block; a block holds one part for each layer of the group.
template <class TC>
constexpr int64_t kv_layer_bytes(int64_t G, int64_t D, int64_t Dv, int64_t block_size) {
  const int64_t scales = kHoldsCodes<TC> ? 2 * static_cast<int64_t>(sizeof(float)) : 0;
  return G * block_size * ((D + Dv) * static_cast<int64_t>(sizeof(TC)) + scales);
}

template <class TC>
INFC_INLINE TC* layer_at(const KvView& kv, int64_t block) {
  return reinterpret_cast<TC*>(static_cast<char*>(kv.base) + block * kv.bytes_per_block +
                               kv.layer_offset);
}
// Element [head][0][offset] of a block's keys; the next d is block_size further.
template <class TC>
INFC_INLINE TC* key_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  return layer_at<TC>(kv, block) + head * kv.D * kv.block_size + offset;
}
// Element [head][offset][0] of a block's values; the next token is Dv further.
template <class TC>
INFC_INLINE TC* value_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  const int64_t keys = static_cast<int64_t>(kv.G) * kv.D * kv.block_size;
  return layer_at<TC>(kv, block) + keys + (head * kv.block_size + offset) * kv.Dv;
}
// Scales [head][offset] of a block of codes; the next token's is one further. block_size is a
// multiple of 16, so they are aligned.
INFC_INLINE float* key_scale_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  const int64_t codes = static_cast<int64_t>(kv.G) * (kv.D + kv.Dv) * kv.block_size;
  return reinterpret_cast<float*>(layer_at<int8_t>(kv, block) + codes) + head * kv.block_size +
         offset;
}
INFC_INLINE float* value_scale_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  return key_scale_at(kv, block, kv.G + head, offset);
}

template <class TC, class T>
INFC_INLINE void write_value(const KvView& kv, int64_t slot, int64_t head, const T* v) {
  const int64_t block = slot / kv.block_size;
  const int64_t offset = slot % kv.block_size;
  TC* out = value_at<TC>(kv, block, head, offset);
  if constexpr (kHoldsCodes<TC>) {
    *value_scale_at(kv, block, head, offset) = quantize_row(v, out, kv.Dv);
  } else {
    for (int64_t d = 0; d < kv.Dv; ++d) out[d] = from_float<TC>(to_float(v[d]));
  }
}

// Writes a key that each(put) hands over: it calls put(d, value) once for each d < D, and does so
// again if it is called again.
template <class TC, class T, class Each>
INFC_INLINE void write_key(const KvView& kv, int64_t slot, int64_t head, Each each) {
  const int64_t block = slot / kv.block_size;
  const int64_t offset = slot % kv.block_size;
  TC* out = key_at<TC>(kv, block, head, offset);
  if constexpr (kHoldsCodes<TC>) {
    int32_t top = 0;
    each([&](int64_t, T x) {
      const int32_t magnitude = bits_of(abs(to_float(x)));
      top = magnitude > top ? magnitude : top;
    });
    const RowScale s = row_scale(from_bits(top));
    each([&](int64_t d, T x) {
      out[d * kv.block_size] = static_cast<int8_t>(quantize(to_float(x), s.inverse));
    });
    *key_scale_at(kv, block, head, offset) = s.scale;
  } else {
    each([&](int64_t d, T x) { out[d * kv.block_size] = from_float<TC>(to_float(x)); });
  }
}

// Writes k [T, G, D] and v [T, G, Dv] (row strides ldk, ldv) to each token's slot
// (block * block_size + offset). TC is the cache's type.
template <class T, class TC>
void kv_write(const Team& t, const T* k, int64_t ldk, const T* v, int64_t ldv, const int32_t* slots,
              int64_t tokens, const KvView& kv) {
  const Share share = share_of(t, tokens * kv.G);
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t token = u / kv.G;
    const int64_t head = u % kv.G;
    const T* key = k + token * ldk + head * kv.D;
    write_key<TC, T>(kv, slots[token], head, [&](auto put) {
      for (int64_t d = 0; d < kv.D; ++d) put(d, key[d]);
    });
    write_value<TC>(kv, slots[token], head, v + token * ldv + head * kv.Dv);
  }
}

// Rotates q [T, H, D] into q_out and k [T, G, D] into the cache, and stores v [T, G, Dv].
// A key is rounded to T (as an unfused rope would) and then to the cache's type TC.
// q_out may be q.
template <class T, class TC, class TT>
void rope_kv_write(const Team& t, const T* q, int64_t ldq, T* q_out, int64_t ldq_out, const T* k,
                   int64_t ldk, const T* v, int64_t ldv, const TT* cos, const TT* sin,
                   int64_t rotary_dim, RopeStyle style, int64_t H, const KvView& kv,
                   const int32_t* slots, int64_t tokens) {
  rope(t, q, ldq, q_out, ldq_out, cos, sin, rotary_dim, style, H, kv.D, tokens);
  const int64_t half = rotary_dim / 2;
  const Share share = share_of(t, tokens * kv.G);
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t token = u / kv.G;
    const int64_t head = u % kv.G;
    const int64_t slot = slots[token];
    const int64_t row = token * half;
    const T* key = k + token * ldk + head * kv.D;
    write_key<TC, T>(kv, slot, head, [&](auto put) {
      rope_row(key, cos + row, sin + row, kv.D, rotary_dim, style, put);
    });
    write_value<TC>(kv, slot, head, v + token * ldv + head * kv.Dv);
  }
}

// Copies whole blocks (all layers of the group): pairs [count, 2] of (source, destination). A
// block is the destination of one pair at most, and no destination is a source.
inline void copy_blocks(const Team& t, const KvView& kv, const int32_t* pairs, int64_t count) {
  const Share share = share_of(t, kv.bytes_per_block, 4096);
  if (share.begin >= share.end) return;
  for (int64_t i = 0; i < count; ++i) {
    char* base = static_cast<char*>(kv.base) + share.begin;
    std::memcpy(base + pairs[2 * i + 1] * kv.bytes_per_block,
                base + pairs[2 * i] * kv.bytes_per_block,
                static_cast<size_t>(share.end - share.begin));
  }
}

}  // namespace infc
