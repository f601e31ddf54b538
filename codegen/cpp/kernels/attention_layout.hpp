// The query rows of a step, what each of them attends to, and the tiles that threads take.
#pragma once

#include "attention_cache.hpp"
#include "row_tiles.hpp"

namespace infc {

// The part of a step that attention reads; as in docs/design/step.md.
struct StepView {
  const int32_t* query_starts;  // [B + 1]
  const int32_t* positions;     // [T]
  const int32_t* block_table;   // [B, table_width], of the layer's group
  int64_t table_width;
  int64_t B;
  int64_t T;
};

constexpr int kTileRows = 64;  // query rows that share a chunk's keys and values at most

// A tile: up to kTileRows (token, head) pairs of one sequence and KV head, token-major.
struct AttentionTile {
  int64_t sequence;
  int64_t kv_head;
  int64_t first;  // index of (token in sequence) * heads + head in the KV head's group
  int rows;
};

class AttentionLayout {
 public:
  // `heads` query heads to each of `kv_heads`; `window` as in AttentionOptions.
  AttentionLayout(const StepView& step, int64_t kv_heads, int64_t heads, int64_t window)
      : step_(step), kv_heads_(kv_heads), heads_(heads), window_(window) {}

  // Calls f(tile) for all rows, cut for `threads`.
  template <class F>
  void for_each_tile(int threads, F f) const {
    for (int64_t b = 0; b < step_.B; ++b) {
      const int64_t rows = rows_of(b);
      const int64_t tile_rows = rows_per_tile(rows, threads);
      for (int64_t g = 0; g < kv_heads_; ++g) {
        for (int64_t r = 0; r < rows; r += tile_rows) {
          f(AttentionTile{b, g, r, static_cast<int>(least(rows - r, tile_rows))});
        }
      }
    }
  }

  // Calls f(tile) with all the rows of each sequence and KV head; none may have more than kTileRows.
  template <class F>
  void for_each_unit(F f) const {
    for (int64_t b = 0; b < step_.B; ++b) {
      const int rows = static_cast<int>(rows_of(b));
      for (int64_t g = 0; rows > 0 && g < kv_heads_; ++g) f(AttentionTile{b, g, 0, rows});
    }
  }

  // Query rows of all units.
  int64_t rows() const { return step_.query_starts[step_.B] * heads_ * kv_heads_; }

  // Query rows of a unit, in the sequence that has most.
  int64_t most_rows() const {
    int64_t rows = 0;
    for (int64_t b = 0; b < step_.B; ++b) rows = most(rows, rows_of(b));
    return rows;
  }

  int64_t token(const AttentionTile& tile, int r) const {
    return step_.query_starts[tile.sequence] + (tile.first + r) / heads_;
  }
  int64_t head(const AttentionTile& tile, int r) const {
    return tile.kv_head * heads_ + (tile.first + r) % heads_;
  }
  Span span(const AttentionTile& tile, int r) const {
    const int64_t last = static_cast<int64_t>(step_.positions[token(tile, r)]) + 1;
    const int64_t first = last - window_;
    return {window_ > 0 && first > 0 ? first : 0, last};
  }
  const int32_t* blocks(const AttentionTile& tile) const {
    return step_.block_table + tile.sequence * step_.table_width;
  }

  // What a tile takes: positions read, in proportion to the rows that meet them.
  int64_t cost(const AttentionTile& tile) const {
    const Span last = span(tile, tile.rows - 1);
    return cost(last.last - last.first, tile.rows);
  }
  static int64_t cost(int64_t positions, int64_t rows) { return (positions + 32) * (rows + 4); }

 private:
  int64_t rows_of(int64_t sequence) const {
    return (step_.query_starts[sequence + 1] - step_.query_starts[sequence]) * heads_;
  }

  // Smaller tiles feed more threads, and make shares more equal; larger ones make more of the cache.
  int64_t rows_per_tile(int64_t rows, int threads) const {
    constexpr int64_t kFew = 16;  // of a sequence that decodes, most likely
    const int64_t units = step_.B * kv_heads_;
    const int64_t parts = ceil_div(rows > kFew ? 4 * threads : threads, units);
    const int64_t fewest = rows > kFew ? kFew : 1;
    return least(most(ceil_div(rows, parts), fewest), kTileRows);
  }

  const StepView& step_;
  int64_t kv_heads_;
  int64_t heads_;
  int64_t window_;
};

}  // namespace infc
