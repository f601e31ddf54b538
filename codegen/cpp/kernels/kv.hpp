// The paged KV cache: where a token's keys and values lie, and the kernels that write them.
//
// A group of layers owns blocks of block_size tokens. Block b of layer l holds, at
// base + b * bytes_per_block + layer_offset, first K as [G][D][block_size] (token innermost, so
// that scores of 16 tokens are one vector), then V as [G][block_size][Dv].
#pragma once

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

// Bytes of one layer's part of a block; a block holds one part for each layer of the group.
template <class TC>
constexpr int64_t kv_layer_bytes(int64_t G, int64_t D, int64_t Dv, int64_t block_size) {
  return G * (D + Dv) * block_size * static_cast<int64_t>(sizeof(TC));
}

// Element [head][0][offset] of a block's keys; the next d is block_size further.
template <class TC>
INFC_INLINE TC* key_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  TC* layer = reinterpret_cast<TC*>(static_cast<char*>(kv.base) + block * kv.bytes_per_block +
                                    kv.layer_offset);
  return layer + head * kv.D * kv.block_size + offset;
}
// Element [head][offset][0] of a block's values; the next token is Dv further.
template <class TC>
INFC_INLINE TC* value_at(const KvView& kv, int64_t block, int64_t head, int64_t offset) {
  TC* layer = reinterpret_cast<TC*>(static_cast<char*>(kv.base) + block * kv.bytes_per_block +
                                    kv.layer_offset);
  const int64_t keys = static_cast<int64_t>(kv.G) * kv.D * kv.block_size;
  return layer + keys + (head * kv.block_size + offset) * kv.Dv;
}

template <class TC, class T>
INFC_INLINE void write_value(const KvView& kv, int64_t slot, int64_t head, const T* v) {
  TC* out = value_at<TC>(kv, slot / kv.block_size, head, slot % kv.block_size);
  for (int64_t d = 0; d < kv.Dv; ++d) out[d] = from_float<TC>(to_float(v[d]));
}
template <class TC, class T>
INFC_INLINE void write_key(const KvView& kv, int64_t slot, int64_t head, const T* k) {
  TC* out = key_at<TC>(kv, slot / kv.block_size, head, slot % kv.block_size);
  for (int64_t d = 0; d < kv.D; ++d) out[d * kv.block_size] = from_float<TC>(to_float(k[d]));
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
    write_key<TC>(kv, slots[token], head, k + token * ldk + head * kv.D);
    write_value<TC>(kv, slots[token], head, v + token * ldv + head * kv.Dv);
  }
}

// Rotates q [T, H, D] into q_out and k [T, G, D] into the cache, and stores v [T, G, Dv].
// A key is rounded to T (as an unfused rope would) and then to the cache's type TC.
// q_out may be q.
template <class T, class TC, class TT, class Pos>
void rope_kv_write(const Team& t, const T* q, int64_t ldq, T* q_out, int64_t ldq_out, const T* k,
                   int64_t ldk, const T* v, int64_t ldv, const Pos* positions, const TT* cos,
                   const TT* sin, int64_t rotary_dim, RopeStyle style, int64_t H, const KvView& kv,
                   const int32_t* slots, int64_t tokens) {
  rope(t, q, ldq, q_out, ldq_out, positions, cos, sin, rotary_dim, style, H, kv.D, tokens);
  const int64_t half = rotary_dim / 2;
  const Share share = share_of(t, tokens * kv.G);
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t token = u / kv.G;
    const int64_t head = u % kv.G;
    const int64_t slot = slots[token];
    const int64_t row = static_cast<int64_t>(positions[token]) * half;
    TC* out = key_at<TC>(kv, slot / kv.block_size, head, slot % kv.block_size);
    const auto put = [&](int64_t d, T x) {
      out[d * kv.block_size] = from_float<TC>(to_float(x));
    };
    rope_row(k + token * ldk + head * kv.D, cos + row, sin + row, kv.D, rotary_dim, style, put);
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
