// Attention of a ragged batch of query rows over the paged cache, prompts and decoding alike.
//
// Chunks of 256 positions start at absolute multiples of 256; within one: scores, scale, soft-cap,
// the maximum, the weights and their sum, the weighted values. Chunks merge from left to right, a
// sink joins last. None of it depends on which rows share a tile, or on the threads, which take whole
// tiles (attention_layout.hpp) or chunks of them (attention_split.hpp).
#pragma once

#include "attention_rows.hpp"
#include "attention_split.hpp"

namespace infc {

// What differs between layers.
struct AttentionOptions {
  float scale;
  int64_t window;   // a row sees its last `window` positions, itself included; 0: all
  float softcap;    // 0: none
};

constexpr int64_t round_up(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

// Bytes of scratch each thread of the team must have for these head sizes.
constexpr int64_t attention_scratch_bytes(int64_t D, int64_t Dv) {
  const int64_t row = round_up(D, kLanes) + kChunk + 2 * round_up(Dv, kLanes);
  return kTileRows * (row * static_cast<int64_t>(sizeof(float)) +
                      static_cast<int64_t>(sizeof(ChunkSums)));
}

// What lies in a thread's scratch: of kTileRows rows each.
struct AttentionScratch {
  AttentionScratch(std::byte* memory, int64_t D, int64_t Dv)
      : width(round_up(Dv, kLanes)),
        q(reinterpret_cast<float*>(memory)),
        scores(q + kTileRows * round_up(D, kLanes)),
        parts(scores + kTileRows * kChunk),
        totals(parts + kTileRows * width),
        sums(reinterpret_cast<ChunkSums*>(totals + kTileRows * width)) {}

  int64_t width;    // of a row of parts or totals
  float* q;         // [rows, D]
  float* scores;    // [rows, kChunk]: of a chunk, then its weights
  float* parts;     // [rows, width]: weighted values of a chunk, or of several pieces
  float* totals;    // [rows, width]: of the chunks merged so far
  ChunkSums* sums;  // [rows]: what goes with `parts`
};

// The maximum and the sum of the weights of rows so far, beside their totals.
struct RunningRows {
  float max[kTileRows];
  float sum[kTileRows];
  bool started[kTileRows];

  // Merges a chunk's result of row r into its total.
  INFC_INLINE void merge(int r, const ChunkSums& chunk, const float* part, float* total,
                         int64_t width) {
    if (!started[r]) {
      started[r] = true;
      max[r] = chunk.max;
      sum[r] = chunk.sum;
      for (int64_t i = 0; i < width; i += kLanes) store(total + i, load(part + i));
      return;
    }
    const float top = infc::max(chunk.max, max[r]);
    const float before = exp(max[r] - top);
    const float now = exp(chunk.max - top);
    sum[r] = fma(chunk.sum, now, sum[r] * before);
    max[r] = top;
    for (int64_t i = 0; i < width; i += kLanes) {
      store(total + i, fma(load(part + i), set1(now), load(total + i) * set1(before)));
    }
  }
};

template <class T, class TC, class TS>
class Attention {
 public:
  Attention(const Team& team, const T* q, int64_t ldq, T* y, int64_t ldy, const StepView& step,
            const KvView& kv, int64_t H, const AttentionOptions& options, const TS* sinks)
      : team_(team), q_(q), ldq_(ldq), y_(y), ldy_(ldy), kv_(kv), options_(options), sinks_(sinks),
        layout_(step, kv.G, H / kv.G, options.window), own_(scratch_of(team.tid)) {}

  void run() {
    const SplitPlan plan = plan_split(layout_, team_.size);
    if (plan.pieces > 0) {
      run_pieces(plan);
    } else {
      deal_tiles(layout_, team_.size, [&](const AttentionTile& tile, int thread) {
        if (thread == team_.tid) run_tile(tile);
      });
    }
  }

 private:
  // A tile's queries in float, and what its rows attend to.
  struct Loaded {
    Span spans[kTileRows];
    int rows;
    HeadCache<TC> cache;
  };

  // Rows of a tile, [from, to).
  struct RowRange {
    int from;
    int to;
  };

  void run_tile(const AttentionTile& tile) {
    RunningRows running{};
    const ChunkRange chunks = chunks_of(layout_, tile);
    const Loaded loaded = load_tile(tile);
    for (int64_t c = chunks.first; c < chunks.first + chunks.count; ++c) {
      const RowRange rows = compute_chunk(loaded, c * kChunk, 0);
      for (int r = rows.from; r < rows.to; ++r) merge(running, r, own_, r);
    }
    for (int r = 0; r < tile.rows; ++r) write_row(tile, r, running, r);
  }

  void run_pieces(const SplitPlan& plan) {
    RunningRows running{};
    const Share rows = share_of(team_, plan.rows);
    const int64_t round = plan.slots * team_.size;
    for (int64_t begin = 0; begin < plan.pieces; begin += round) {
      compute_pieces(plan, begin + plan.slots * team_.tid);
      team_.barrier();
      merge_pieces(plan, begin, rows, running);
      team_.barrier();  // others read this thread's scratch until here
    }
    for_each_split_unit(layout_, [&](const SplitUnit& unit) {
      const int64_t last = least(rows.end, unit.row + unit.tile.rows);
      for (int64_t row = most(rows.begin, unit.row); row < last; ++row) {
        write_row(unit.tile, static_cast<int>(row - unit.row), running,
                  static_cast<int>(row - rows.begin));
      }
    });
  }

  // Leaves the results of the plan's pieces from `begin` on in this thread's slots.
  void compute_pieces(const SplitPlan& plan, int64_t begin) {
    for_each_split_unit(layout_, [&](const SplitUnit& unit) {
      const int64_t first = most(begin, unit.piece);
      const int64_t last = least(begin + plan.slots, unit.piece + unit.chunks.count);
      if (first >= last) return;
      const Loaded loaded = load_tile(unit.tile);
      for (int64_t p = first; p < last; ++p) {
        compute_chunk(loaded, unit.start_of(p), (p - begin) * plan.unit_rows);
      }
    });
  }

  // Merges what the threads have left in the round that starts at `begin`, for `rows`.
  void merge_pieces(const SplitPlan& plan, int64_t begin, const Share& rows,
                    RunningRows& running) {
    const int64_t end = begin + plan.slots * team_.size;
    for_each_split_unit(layout_, [&](const SplitUnit& unit) {
      const int64_t first_row = most(rows.begin, unit.row);
      const int64_t last_row = least(rows.end, unit.row + unit.tile.rows);
      if (first_row >= last_row) return;
      const int64_t last = least(end, unit.piece + unit.chunks.count);
      for (int64_t p = most(begin, unit.piece); p < last; ++p) {
        const AttentionScratch from = scratch_of(static_cast<int>((p - begin) / plan.slots));
        const int64_t slot = (p - begin) % plan.slots * plan.unit_rows;
        for (int64_t row = first_row; row < last_row; ++row) {
          const int r = static_cast<int>(row - unit.row);
          const Span inside = part_of(layout_.span(unit.tile, r), unit.start_of(p));
          if (inside.first >= inside.last) continue;
          merge(running, static_cast<int>(row - rows.begin), from, slot + r);
        }
      }
    });
  }

  AttentionScratch scratch_of(int thread) const {
    return AttentionScratch(team_.scratch_of(thread), kv_.D, kv_.Dv);
  }

  Loaded load_tile(const AttentionTile& tile) {
    const int64_t last = layout_.span(tile, tile.rows - 1).last;
    Loaded loaded{{}, tile.rows, {kv_, layout_.blocks(tile), tile.kv_head, last}};
    for (int r = 0; r < tile.rows; ++r) {
      loaded.spans[r] = layout_.span(tile, r);
      const T* q = q_ + layout_.token(tile, r) * ldq_ + layout_.head(tile, r) * kv_.D;
      for (int64_t d = 0; d < kv_.D; ++d) own_.q[r * kv_.D + d] = to_float(q[d]);
    }
    return loaded;
  }

  static Span part_of(const Span& span, int64_t chunk) {
    return {most(span.first, chunk), least(span.last, chunk + kChunk)};
  }

  // Leaves the chunk's result for row r in part `slot` + r, and returns the rows that have one.
  // Rows are in order of position, so those that see anything of the chunk are adjacent.
  RowRange compute_chunk(const Loaded& loaded, int64_t chunk, int64_t slot) {
    Span inside[kTileRows];
    RowRange seeing{loaded.rows, 0};
    int64_t first = chunk + kChunk;
    int64_t last = chunk;
    for (int r = 0; r < loaded.rows; ++r) {
      inside[r] = part_of(loaded.spans[r], chunk);
      if (inside[r].first >= inside[r].last) continue;
      seeing = {r < seeing.from ? r : seeing.from, r + 1};
      first = least(first, inside[r].first);
      last = most(last, inside[r].last);
    }
    if (seeing.from >= seeing.to) return seeing;
    const int count = seeing.to - seeing.from;
    const float* q = own_.q + seeing.from * kv_.D;
    float* parts = own_.parts + (slot + seeing.from) * own_.width;
    ChunkSums* sums = own_.sums + slot + seeing.from;
    const int64_t begin = first / kLanes * kLanes;
    const int64_t end = round_up(last, kLanes);
    score_rows(loaded.cache, q, count, chunk, begin, end, own_.scores);
    for (int r = 0; r < count; ++r) {
      sums[r] = weigh_row(own_.scores + r * kChunk, chunk, inside[seeing.from + r], options_.scale,
                          options_.softcap);
      for (int64_t i = 0; i < own_.width; i += kLanes) store(parts + r * own_.width + i, zeros());
    }
    if constexpr (kHoldsCodes<TC>) {
      scale_weights(loaded.cache, own_.scores, count, chunk, begin, end);
    }
    value_rows(loaded.cache, own_.scores, inside + seeing.from, count, chunk,
               Sums{parts, own_.width});
    return seeing;
  }

  // Merges part `slot` of a thread's scratch into the running row r.
  INFC_INLINE void merge(RunningRows& running, int r, const AttentionScratch& from, int64_t slot) {
    running.merge(r, from.sums[slot], from.parts + slot * own_.width, own_.totals + r * own_.width,
                  own_.width);
  }

  // Writes a tile's row r, which is the running row `at`.
  void write_row(const AttentionTile& tile, int r, const RunningRows& running, int at) {
    const int64_t head = layout_.head(tile, r);
    float factor = 1.0f;
    float sum = running.sum[at];
    if (sinks_ != nullptr) {
      // A sink is one more score without a value.
      const float sink = to_float(sinks_[head]);
      const float top = max(sink, running.max[at]);
      factor = exp(running.max[at] - top);
      sum = fma(sum, factor, exp(sink - top));
    }
    T* out = y_ + layout_.token(tile, r) * ldy_ + head * kv_.Dv;
    const float* total = own_.totals + at * own_.width;
    for_each_group(kv_.Dv, [&](int64_t i, int64_t n) {
      store_group(out + i, load(total + i) * set1(factor) / set1(sum), n);
    });
  }

  const Team& team_;
  const T* q_;
  int64_t ldq_;
  T* y_;
  int64_t ldy_;
  const KvView& kv_;
  const AttentionOptions& options_;
  const TS* sinks_;
  AttentionLayout layout_;
  AttentionScratch own_;
};

// q [T, H, D] (row stride ldq) → y [T, H, Dv] (row stride ldy), causal by absolute position, over
// the keys and values in the cache (of type TC), where the step's own tokens have been written.
// sinks [H] or null. Needs attention_scratch_bytes(D, Dv) of scratch on each thread. May have
// barriers inside, and then one at the end.
template <class T, class TC, class TS = T>
void paged_attention(const Team& t, const T* q, int64_t ldq, T* y, int64_t ldy,
                     const StepView& step, const KvView& kv, int64_t H, float scale, int64_t window,
                     float softcap, const TS* sinks) {
  const AttentionOptions options{scale, window, softcap};
  Attention<T, TC, TS>(t, q, ldq, y, ldy, step, kv, H, options, sinks).run();
}

}  // namespace infc
