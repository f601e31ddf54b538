// Tokens from logits: the greatest of a row, or one drawn from what temperature, top-k, top-p and
// min-p leave of it.
//
// runtime/sampling/sampler.py has the meaning. An element weighs e**((x - greatest) / temperature) in float,
// and what is summed of weights is summed in one order, so a token depends on its row and its draw
// alone.
#pragma once

#include "abi.hpp"
#include "adjust.hpp"
#include "outputs.hpp"
#include "philox.hpp"
#include "top_shares.hpp"
#include "weights.hpp"

namespace infc {

// Bytes of scratch that each thread needs for rows of this width.
constexpr int64_t draw_scratch_bytes(int64_t width) { return (width + kLanes) / kLanes * 128; }

// The elements of one row by their order, and what is left of their weights.
class Shares {
 public:
  // Weighs x [width]; `scratch` has draw_scratch_bytes(width). A temperature that float cannot tell
  // from 0 leaves the greatest alone.
  template <class Row>
  Shares(const Row& x, int64_t width, float greatest, double temperature, void* scratch)
      : size_((width + kLanes - 1) / kLanes * kLanes),
        keys_(static_cast<int32_t*>(scratch)),
        weights_(static_cast<float*>(scratch) + size_) {
    const Weigh weigh(greatest, temperature);
    for_each_group(width, [&](int64_t i, int64_t n) {
      f32x16 v = x.group(i, n);
      if (n < kLanes) v = select(lanes_between(0, 0, static_cast<int32_t>(n)), v, set1(-kInfinity));
      store(weights_ + i, weigh(v));
      store_keys(keys_ + i, keys_of(v));
    });
  }

  // Keeps the `count` greatest; of equals the first.
  void keep_count(int64_t count) { keep_top(static_cast<double>(count), &Sum::count); }

  // Keeps the shortest run of the greatest that has this share of the weight; of equals the first.
  void keep_share(double share) {
    keep_top(share_of_weight(share, sum_from(INT32_MIN).weight), &Sum::weight);
  }

  // Keeps what is at least `least`.
  void keep_from(float least) { cut({key_of(least), size_}); }

  // The first element at which the running sum of weights exceeds `u` of the total, or the last
  // of any weight where rounding denies that.
  int32_t at_quantile(double u) const {
    const double wanted = u * sum_from(INT32_MIN).weight;
    double before = 0.0;  // of blocks in front of `block`
    double sum = 0.0;
    int64_t block = 0;
    for (int64_t i = 0; i < size_ && sum <= wanted; i += kBlock) {
      const double weight = sum_block(i, INT32_MIN).weight;
      if (weight == 0.0) continue;
      block = i;
      before = sum;
      sum += weight;
    }
    int64_t found = block;
    for (int64_t i = block; i < block_end(block); ++i) {
      if (weights_[i] == 0.0f) continue;
      found = i;
      before += static_cast<double>(weights_[i]);
      if (before > wanted) break;
    }
    return static_cast<int32_t>(found);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int64_t kBlock = kWeightBlock;
  static constexpr int kFew = kSortedWeights;

  struct Sum {
    double count;
    double weight;
  };
  // An element: in descending order come those of a greater key, of equals those of a smaller index.
  struct Place {
    int32_t key;
    int64_t index;
  };

  static void store_keys(int32_t* p, const i32x16& keys) {
    store(reinterpret_cast<float*>(p), from_bits(keys));
  }
  i32x16 keys_at(int64_t i) const {
    return bits_of(load(reinterpret_cast<const float*>(keys_ + i)));
  }

  int64_t block_end(int64_t start) const {
    return start + kBlock < size_ ? start + kBlock : size_;
  }
  Sum sum_block(int64_t start, int32_t least) const {
    f32x16 count = zeros();
    f32x16 weight = zeros();
    for (int64_t i = start; i < block_end(start); i += kLanes) {
      const i32x16 in = ge(keys_at(i), splat_int<i32x16>(least));
      count = count + select(in, set1(1.0f), zeros());
      weight = weight + select(in, load(weights_ + i), zeros());
    }
    return {static_cast<double>(sum_lanes(count)), static_cast<double>(sum_lanes(weight))};
  }
  // Of all elements whose key is at least `least`.
  Sum sum_from(int32_t least) const {
    Sum sum{0.0, 0.0};
    for (int64_t i = 0; i < size_; i += kBlock) {
      const Sum block = sum_block(i, least);
      sum.count += block.count;
      sum.weight += block.weight;
    }
    return sum;
  }

  // Keeps the shortest run of the greatest whose count or weight reaches `wanted`. A search by
  // halves for its least key, until few elements are left to sort, or equal ones.
  void keep_top(double wanted, double Sum::*measure) {
    int64_t low = INT32_MIN;  // from this key on `wanted` is reached, if it ever is
    int64_t high = INT32_MAX;  // and from this one on it is not
    Sum from_low = sum_from(INT32_MIN);
    Sum from_high{0.0, 0.0};
    while (high - low > 1 && from_low.count - from_high.count > kFew) {
      const int64_t middle = (low + high) >> 1;
      const Sum sum = sum_from(static_cast<int32_t>(middle));
      const bool reached = sum.*measure >= wanted;
      (reached ? low : high) = middle;
      (reached ? from_low : from_high) = sum;
    }
    const bool sorts = high - low > 1;
    Place few[kFew];
    int found = 0;
    double sum = from_high.*measure;
    Place last{static_cast<int32_t>(low), size_};
    for (int64_t i = 0; i < size_; ++i) {
      if (keys_[i] < low || keys_[i] >= high) continue;
      if (sorts) {
        insert(few, found++, {keys_[i], i});
      } else if ((sum += measure_of(i, measure)) >= wanted) {
        last.index = i;
        break;
      }
    }
    for (int f = 0; f < found; ++f) {
      if ((sum += measure_of(few[f].index, measure)) >= wanted) {
        last = few[f];
        break;
      }
    }
    cut(last);
  }
  double measure_of(int64_t i, double Sum::*measure) const {
    return Sum{1.0, static_cast<double>(weights_[i])}.*measure;
  }
  static void insert(Place* sorted, int count, const Place& place) {
    int at = count;
    for (; at > 0 && sorted[at - 1].key < place.key; --at) sorted[at] = sorted[at - 1];
    sorted[at] = place;
  }
  // Takes the weight of all that comes behind `last`; its index may lie behind all.
  void cut(const Place& last) {
    const int64_t equals = last.index < size_ ? last.index + 1 : size_;
    drop_below(0, equals, last.key);
    drop_below(equals, size_, last.key + 1);
  }
  void drop_below(int64_t from, int64_t to, int32_t least) {
    for (int64_t i = from; i < to; ++i) weights_[i] = keys_[i] >= least ? weights_[i] : 0.0f;
  }

  int64_t size_;  // padded to whole groups with elements of no weight
  int32_t* keys_;
  float* weights_;
};

// The token at a draw's quantile of what top-p and min-p leave of `shares`.
template <class S>
int32_t draw_share(S& shares, const infc_draw& draw, float top) {
  if (draw.top_p < 1.0) shares.keep_share(draw.top_p);
  if (draw.min_p > 0.0) {
    // A share of the greatest is a distance from it.
    const double least = static_cast<double>(top) + draw.temperature * __builtin_log(draw.min_p);
    shares.keep_from(static_cast<float>(least));
  }
  return shares.at_quantile(uniform(draw.seed, draw.choice, draw.position));
}

// The token that a draw takes from x [width], all of which is weighed; -1 where one is NaN or the
// greatest is infinite.
template <class Row>
int32_t draw_of_all(const Row& x, int64_t width, const infc_draw& draw, void* scratch) {
  const int32_t best = greatest(x, width);
  if (best < 0 || draw.temperature == 0.0) return best;
  const float top = x.at(best);
  Shares shares(x, width, top, draw.temperature, scratch);
  if (draw.top_k > 0 && draw.top_k < width) shares.keep_count(draw.top_k);
  return draw_share(shares, draw, top);
}

// The same, weighing only what top-k keeps where that is little.
template <class Row>
int32_t draw_token(const Row& x, int64_t width, const infc_draw& draw, void* scratch) {
  if (draw.temperature != 0.0 && TopShares::fits(draw.top_k, width)) {
    TopShares shares(x, width, draw.top_k, draw.temperature, scratch);
    if (!shares.is_valid()) return -1;
    if (shares.is_whole()) return draw_share(shares, draw, shares.top());
  }
  return draw_of_all(x, width, draw, scratch);
}

// The token that a draw takes from x [width] after adjustments.
template <class T>
int32_t draw_adjusted(const T* x, int64_t width, const infc_draw& draw, const infc_adjustments& a,
                      const infc_adjusted& row, void* scratch) {
  const uint32_t* mask = row.mask < 0 ? nullptr : a.masks + row.mask * a.mask_words;
  if (mask != nullptr && !edits_tokens(row)) {
    return draw_token(MaskedLogits<T>{x, mask}, width, draw, scratch);
  }
  // `Shares` reads each element before it writes its weight there.
  float* adjusted = static_cast<float*>(scratch) + ceil_groups(width) * kLanes;
  if (!adjust_row(x, a, row, adjusted, width)) return -1;
  return draw_token(Logits<float>{adjusted}, width, draw, scratch);
}

// Takes the tokens of a step from the rows of x [.., width] that its draws name, adjusted where it
// says so. Needs draw_scratch_bytes(width) on each thread.
template <class T>
void draw_tokens(const Team& t, const T* x, const infc_step& s, int64_t width) {
  const Share share = share_of(t, s.num_draws);
  const infc_adjusted* row = s.adjustments == nullptr ? nullptr : s.adjustments->rows;
  const infc_adjusted* end = row == nullptr ? row : row + s.adjustments->num_rows;
  for (int64_t i = share.begin; i < share.end; ++i) {
    const infc_draw& draw = s.draws[i];
    const T* logits = x + draw.row * width;
    while (row != end && row->draw < i) ++row;
    if (row != end && row->draw == i) {
      s.tokens[i] = draw_adjusted(logits, width, draw, *s.adjustments, *row, t.scratch);
    } else {
      s.tokens[i] = draw_token(Logits<T>{logits}, width, draw, t.scratch);
    }
  }
}

}  // namespace infc
