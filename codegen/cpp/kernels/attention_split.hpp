// How threads share the contexts of few query rows, where whole tiles would leave some idle.
//
// A unit is a sequence and KV head with all its rows; a piece is a chunk of a unit's context. In
// rounds each thread takes the next pieces and leaves their results in its scratch; behind a barrier
// each thread merges them for the rows that are its own, from left to right as one thread would. So
// the bits don't depend on it (flash-decoding, Dao et al. 2023, but for the order of merging).
#pragma once

#include "attention_layout.hpp"
#include "attention_tile.hpp"

namespace infc {

// Chunks, in multiples of kChunk.
struct ChunkRange {
  int64_t first;
  int64_t count;
};

// The chunks that a tile's rows attend to. Rows are in order of position.
inline ChunkRange chunks_of(const AttentionLayout& layout, const AttentionTile& tile) {
  const int64_t first = layout.span(tile, 0).first / kChunk;
  const int64_t end = ceil_div(layout.span(tile, tile.rows - 1).last, kChunk);
  return {first, end - first};
}

struct SplitUnit {
  AttentionTile tile;
  ChunkRange chunks;
  int64_t piece;  // pieces before its own
  int64_t row;    // rows before its own

  // The first position of a piece's chunk.
  int64_t start_of(int64_t p) const { return (chunks.first + p - piece) * kChunk; }
};

template <class F>
void for_each_split_unit(const AttentionLayout& layout, F f) {
  int64_t piece = 0;
  int64_t row = 0;
  layout.for_each_unit([&](const AttentionTile& tile) {
    const SplitUnit unit{tile, chunks_of(layout, tile), piece, row};
    f(unit);
    piece += unit.chunks.count;
    row += tile.rows;
  });
}

struct SplitPlan {
  int64_t pieces;     // in all; 0 where whole tiles are better
  int64_t rows;       // in all
  int64_t unit_rows;  // of a unit, at most
  int64_t slots;      // pieces that a thread takes in a round, at most
};

// Calls f(tile, thread): threads take tiles in order, each about as much by cost.
template <class F>
void deal_tiles(const AttentionLayout& layout, int threads, F f) {
  int64_t total = 0;
  layout.for_each_tile(threads, [&](const AttentionTile& tile) { total += layout.cost(tile); });
  int64_t at = 0;
  int thread = 0;
  int64_t end = total / threads;
  layout.for_each_tile(threads, [&](const AttentionTile& tile) {
    for (; at >= end; end = total * (thread + 1) / threads) ++thread;
    f(tile, thread);
    at += layout.cost(tile);
  });
}

// What the thread takes that takes longest, if each takes whole tiles.
inline int64_t longest_share(const AttentionLayout& layout, int threads) {
  int64_t longest = 0;
  int64_t share = 0;
  int last = 0;
  deal_tiles(layout, threads, [&](const AttentionTile& tile, int thread) {
    share = (thread == last ? share : 0) + layout.cost(tile);
    longest = most(longest, share);
    last = thread;
  });
  return longest;
}

// Every thread comes to the same plan.
inline SplitPlan plan_split(const AttentionLayout& layout, int threads) {
  constexpr SplitPlan kWhole{};
  const int64_t rows = layout.rows();
  // A thread has room for the results of kTileRows rows, and merges as many.
  if (threads == 1 || rows == 0 || rows > threads * kTileRows) return kWhole;
  const int64_t unit_rows = layout.most_rows();
  if (unit_rows > kTileRows / 2) return kWhole;
  int64_t units = 0;
  int64_t pieces = 0;
  for_each_split_unit(layout, [&](const SplitUnit& unit) {
    ++units;
    pieces += unit.chunks.count;
  });
  if (pieces == units) return kWhole;  // as the contexts are short
  const int64_t share = ceil_div(pieces, threads);
  // Barriers, merging and chunks that are not whole must not cost more than is won.
  const int64_t cost = AttentionLayout::cost(share * kChunk, unit_rows);
  if (cost + cost / 4 >= longest_share(layout, threads)) return kWhole;
  const int64_t rounds = ceil_div(share, kTileRows / unit_rows);
  return {pieces, rows, unit_rows, ceil_div(share, rounds)};
}

}  // namespace infc
