// Attention of a ragged batch of query rows over the paged cache, prompts and decoding alike.
//
// Chunks of 256 positions start at absolute multiples of 256; within one: scores, scale, soft-cap,
// the maximum, the weights and their sum, the weighted values. Chunks merge from left to right, a
// sink joins last. None of it depends on which rows share a tile, or on the threads.
#pragma once

#include "attention_rows.hpp"

namespace infc {

// The part of a step that attention reads; as in docs/design/step.md.
struct StepView {
  const int32_t* query_starts;     // [B + 1]
  const int32_t* context_lengths;  // [B]
  const int32_t* positions;        // [T]
  const int32_t* block_table;      // [B, table_width], of the layer's group
  int64_t table_width;
  int64_t B;
  int64_t T;
};

// What differs between layers.
struct AttentionOptions {
  float scale;
  int64_t window;   // a row sees its last `window` positions, itself included; 0: all
  float softcap;    // 0: none
};

constexpr int kTileRows = 64;  // query rows that share a chunk's keys and values at most

constexpr int64_t round_up(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

// Bytes of scratch each thread of the team must have for these head sizes.
constexpr int64_t attention_scratch_bytes(int64_t D, int64_t Dv) {
  const int64_t width = round_up(Dv, kLanes);
  const int64_t row = round_up(D, kLanes) + kChunk + 2 * width;
  return static_cast<int64_t>(sizeof(float)) * kTileRows * row;
}

// A tile: up to kTileRows (token, head) pairs of one sequence and KV head, token-major.
struct AttentionTile {
  int64_t sequence;
  int64_t kv_head;
  int64_t first;  // index of (token in sequence) * heads + head in the KV head's group
  int rows;
};

// The running result of a tile.
struct TileState {
  float max[kTileRows];
  float sum[kTileRows];
  bool started[kTileRows];
};

// Merges a chunk's result of one row into the running one.
INFC_INLINE void merge_row(TileState& state, int r, const ChunkSums& chunk, const float* part,
                           float* total, int64_t width) {
  if (!state.started[r]) {
    state.started[r] = true;
    state.max[r] = chunk.max;
    state.sum[r] = chunk.sum;
    for (int64_t i = 0; i < width; i += kLanes) store(total + i, load(part + i));
    return;
  }
  const float top = max(chunk.max, state.max[r]);
  const float before = exp(state.max[r] - top);
  const float now = exp(chunk.max - top);
  state.sum[r] = fma(chunk.sum, now, state.sum[r] * before);
  state.max[r] = top;
  for (int64_t i = 0; i < width; i += kLanes) {
    store(total + i, fma(load(part + i), set1(now), load(total + i) * set1(before)));
  }
}

template <class T, class TC, class TS>
class Attention {
 public:
  Attention(const Team& team, const T* q, int64_t ldq, T* y, int64_t ldy, const StepView& step,
            const KvView& kv, int64_t H, const AttentionOptions& options, const TS* sinks)
      : team_(team), q_(q), ldq_(ldq), y_(y), ldy_(ldy), step_(step), kv_(kv),
        heads_(H / kv.G), options_(options), sinks_(sinks) {
    float* scratch = reinterpret_cast<float*>(team.scratch);
    wide_q_ = scratch;
    scores_ = wide_q_ + kTileRows * round_up(kv.D, kLanes);
    width_ = round_up(kv.Dv, kLanes);
    part_ = scores_ + kTileRows * kChunk;
    total_ = part_ + kTileRows * width_;
  }

  // Takes this thread's share of all tiles, by their cost (positions read).
  void run() {
    int64_t total = 0;
    for_each_tile([&](const AttentionTile& tile) { total += cost(tile); });
    const Share share = share_of(team_, total);
    int64_t at = 0;
    for_each_tile([&](const AttentionTile& tile) {
      if (at >= share.begin && at < share.end) compute(tile);
      at += cost(tile);
    });
  }

 private:
  template <class F>
  void for_each_tile(F f) const {
    for (int64_t b = 0; b < step_.B; ++b) {
      const int64_t rows = (step_.query_starts[b + 1] - step_.query_starts[b]) * heads_;
      const int64_t tile_rows = rows_per_tile(rows);
      for (int64_t g = 0; g < kv_.G; ++g) {
        for (int64_t r = 0; r < rows; r += tile_rows) {
          const int64_t left = rows - r;
          f(AttentionTile{b, g, r, static_cast<int>(left < tile_rows ? left : tile_rows)});
        }
      }
    }
  }

  // Smaller tiles feed more threads, and make shares more equal; larger ones make more of the cache.
  int64_t rows_per_tile(int64_t rows) const {
    constexpr int64_t kFew = 16;  // of a sequence that decodes, most likely
    const int64_t units = step_.B * kv_.G;
    const int64_t parts = ceil_div(rows > kFew ? 4 * team_.size : team_.size, units);
    const int64_t least = rows > kFew ? kFew : 1;
    const int64_t size = ceil_div(rows, parts);
    return size < least ? least : size < kTileRows ? size : kTileRows;
  }

  Span span_of(const AttentionTile& tile, int r) const {
    const int64_t token = step_.query_starts[tile.sequence] + (tile.first + r) / heads_;
    const int64_t last = static_cast<int64_t>(step_.positions[token]) + 1;
    const int64_t first = last - options_.window;
    return {options_.window > 0 && first > 0 ? first : 0, last};
  }

  int64_t cost(const AttentionTile& tile) const {
    const Span last = span_of(tile, tile.rows - 1);
    return (last.last - last.first + 32) * (tile.rows + 4);
  }

  void compute(const AttentionTile& tile) {
    Span spans[kTileRows];
    TileState state{};
    int64_t first = INT64_MAX;
    int64_t last = 0;
    for (int r = 0; r < tile.rows; ++r) {
      spans[r] = span_of(tile, r);
      first = spans[r].first < first ? spans[r].first : first;
      last = spans[r].last > last ? spans[r].last : last;
      widen_query(tile, r);
    }
    const HeadCache<TC> cache(kv_, step_.block_table + tile.sequence * step_.table_width,
                              tile.kv_head, last);
    for (int64_t chunk = first / kChunk * kChunk; chunk < last; chunk += kChunk) {
      compute_chunk(cache, spans, tile.rows, chunk, state);
    }
    for (int r = 0; r < tile.rows; ++r) write_row(tile, r, state);
  }

  void widen_query(const AttentionTile& tile, int r) {
    const int64_t token = step_.query_starts[tile.sequence] + (tile.first + r) / heads_;
    const int64_t head = tile.kv_head * heads_ + (tile.first + r) % heads_;
    const T* q = q_ + token * ldq_ + head * kv_.D;
    for (int64_t d = 0; d < kv_.D; ++d) wide_q_[r * kv_.D + d] = to_float(q[d]);
  }

  // Rows are in order of position, so those that see anything of the chunk are adjacent.
  void compute_chunk(const HeadCache<TC>& cache, const Span* spans, int rows, int64_t chunk,
                     TileState& state) {
    Span inside[kTileRows];
    int from = rows;
    int to = 0;
    int64_t first = chunk + kChunk;
    int64_t last = chunk;
    for (int r = 0; r < rows; ++r) {
      const Span& s = spans[r];
      inside[r] = {s.first > chunk ? s.first : chunk,
                   s.last < chunk + kChunk ? s.last : chunk + kChunk};
      if (inside[r].first >= inside[r].last) continue;
      from = r < from ? r : from;
      to = r + 1;
      first = inside[r].first < first ? inside[r].first : first;
      last = inside[r].last > last ? inside[r].last : last;
    }
    if (from >= to) return;
    const int count = to - from;
    const float* q = wide_q_ + from * kv_.D;
    const int64_t begin = first / kLanes * kLanes;
    const int64_t end = round_up(last, kLanes);
    score_rows(cache, q, count, chunk, begin, end, scores_);
    ChunkSums sums[kTileRows];
    for (int r = 0; r < count; ++r) {
      sums[r] = weigh_row(scores_ + r * kChunk, chunk, inside[from + r], options_.scale,
                          options_.softcap);
      for (int64_t i = 0; i < width_; i += kLanes) store(part_ + r * width_ + i, zeros());
    }
    if constexpr (kHoldsCodes<TC>) scale_weights(cache, scores_, count, chunk, begin, end);
    value_rows(cache, scores_, inside + from, count, chunk, Sums{part_, width_});
    for (int r = 0; r < count; ++r) {
      merge_row(state, from + r, sums[r], part_ + r * width_, total_ + (from + r) * width_, width_);
    }
  }

  void write_row(const AttentionTile& tile, int r, const TileState& state) {
    const int64_t token = step_.query_starts[tile.sequence] + (tile.first + r) / heads_;
    const int64_t head = tile.kv_head * heads_ + (tile.first + r) % heads_;
    float factor = 1.0f;
    float sum = state.sum[r];
    if (sinks_ != nullptr) {
      // A sink is one more score without a value.
      const float sink = to_float(sinks_[head]);
      const float top = max(sink, state.max[r]);
      factor = exp(state.max[r] - top);
      sum = fma(sum, factor, exp(sink - top));
    }
    T* out = y_ + token * ldy_ + head * kv_.Dv;
    const float* total = total_ + r * width_;
    for_each_group(kv_.Dv, [&](int64_t i, int64_t n) {
      store_group(out + i, load(total + i) * set1(factor) / set1(sum), n);
    });
  }

  const Team& team_;
  const T* q_;
  int64_t ldq_;
  T* y_;
  int64_t ldy_;
  const StepView& step_;
  const KvView& kv_;
  int64_t heads_;  // query heads to one KV head
  const AttentionOptions& options_;
  const TS* sinks_;
  float* wide_q_;
  float* scores_;
  float* part_;
  float* total_;
  int64_t width_;
};

// q [T, H, D] (row stride ldq) → y [T, H, Dv] (row stride ldy), causal by absolute position, over
// the keys and values in the cache (of type TC), where the step's own tokens have been written.
// sinks [H] or null. Needs attention_scratch_bytes(D, Dv) of scratch on each thread.
template <class T, class TC, class TS = T>
void paged_attention(const Team& t, const T* q, int64_t ldq, T* y, int64_t ldy,
                     const StepView& step, const KvView& kv, int64_t H, float scale, int64_t window,
                     float softcap, const TS* sinks) {
  const AttentionOptions options{scale, window, softcap};
  Attention<T, TC, TS>(t, q, ldq, y, ldy, step, kv, H, options, sinks).run();
}

}  // namespace infc
