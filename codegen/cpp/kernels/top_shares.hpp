// The few greatest elements of a row, by top-k, and what is left of their weights.
//
// They are found in one pass over the row, and the others are never weighed. All results have the
// bits that `Shares` (sampling.hpp) gives for the whole row: weights are summed in blocks of the row,
// and top-p searches in the same steps.
#pragma once

#include <limits>

#include "logits.hpp"
#include "simd.hpp"
#include "weights.hpp"

namespace infc {

class TopShares {
 public:
  // Whether so few of so many elements are worth it, or possible at all.
  static bool fits(int64_t count, int64_t width) {
    return count > 0 && count <= kMost && 3 * num_found(count) <= num_hands(width);
  }

  // Weighs the `count` greatest of x [width], of equals the first; `scratch` has 4 bytes an element.
  template <class Row>
  TopShares(const Row& x, int64_t width, int64_t count, double temperature, void* scratch) {
    float* best = static_cast<float*>(scratch);  // of each hand
    top_ = deal(x, width, best);
    is_valid_ = top_ - top_ == 0.0f;
    if (!is_valid_) return;
    floor_ = common_floor(best, num_hands(width), num_found(count));
    is_whole_ = collect(x, width, best);
    if (!is_whole_) return;
    keep_count(static_cast<int>(count));
    weigh(x, temperature);
  }

  // Whether there is no NaN, and the greatest is finite.
  bool is_valid() const { return is_valid_; }
  // Whether all was found; where too many are equal, it is not.
  bool is_whole() const { return is_whole_; }
  float top() const { return top_; }

  // Keeps the shortest run of the greatest that has this share of the weight; of equals the first.
  void keep_share(double share) {
    const double wanted = share_of_weight(share, sum_from(INT32_MIN));
    int64_t low = INT32_MIN;
    int64_t high = INT32_MAX;
    int64_t above_low = count_from(INT32_MIN);
    int64_t above_high = 0;
    double sum = 0.0;  // from `high` on
    while (high - low > 1 && above_low - above_high > kSortedWeights) {
      const int64_t middle = (low + high) >> 1;
      const double weight = sum_from(static_cast<int32_t>(middle));
      const bool reached = weight >= wanted;
      (reached ? low : high) = middle;
      (reached ? above_low : above_high) = count_from(static_cast<int32_t>(middle));
      if (!reached) sum = weight;
    }
    int order[kMost];
    int found = 0;
    for (int i = 0; i < count_; ++i) {
      if (keys_[i] < low || keys_[i] >= high) continue;
      int at = found++;
      for (; at > 0 && keys_[order[at - 1]] < keys_[i]; --at) order[at] = order[at - 1];
      order[at] = i;
    }
    for (int f = 0; f < found; ++f) {
      if ((sum += static_cast<double>(weights_[order[f]])) >= wanted) {
        return cut(keys_[order[f]], places_[order[f]]);
      }
    }
    cut(static_cast<int32_t>(low), INT32_MAX);
  }

  // Keeps what is at least `least`.
  void keep_from(float least) { cut(key_of(least), INT32_MAX); }

  // The first element at which the running sum of weights exceeds `u` of the total, or the last
  // of any weight where rounding denies that.
  int32_t at_quantile(double u) const {
    const double wanted = u * sum_from(INT32_MIN);
    double before = 0.0;  // of blocks in front of the one from `begin`
    double sum = 0.0;
    int begin = 0;
    for (int i = 0; i < count_ && sum <= wanted;) {
      const int end = block_end(i);
      const double weight = sum_block(i, end, INT32_MIN);
      if (weight != 0.0) {
        begin = i;
        before = sum;
        sum += weight;
      }
      i = end;
    }
    int found = begin;
    for (int i = begin; i < block_end(begin); ++i) {
      if (weights_[i] == 0.0f) continue;
      found = i;
      before += static_cast<double>(weights_[i]);
      if (before > wanted) break;
    }
    return places_[found];
  }

 private:
  // A row is dealt into hands: of each block of kDealt groups every lane is one.
  static constexpr int64_t kDealt = 32;
  static constexpr int64_t kDeal = kDealt * kLanes;
  static constexpr int kMost = 128;
  static constexpr int kRoom = 1024;  // candidates

  // Candidates that are to be found at least: `keep_share` must be able to tell whether more than
  // kSortedWeights of the row are between two of them.
  static int64_t num_found(int64_t count) { return count + kSortedWeights + 1; }
  static int64_t num_hands(int64_t width) { return (width + kDeal - 1) / kDeal * kLanes; }

  // The greatest of each hand, and of all; NaN where there is one.
  template <class Row>
  static float deal(const Row& x, int64_t width, float* best) {
    const f32x16 low = set1(-std::numeric_limits<float>::infinity());
    i32x16 wrong = splat_int<i32x16>(0);
    f32x16 top = low;
    for (int64_t start = 0; start < width; start += kDeal) {
      f32x16 most = low;
      for_each_group(width - start < kDeal ? width - start : kDeal, [&](int64_t i, int64_t n) {
        f32x16 v = x.group(start + i, n);
        if (n < kLanes) v = select(lanes_between(0, 0, static_cast<int32_t>(n)), v, low);
        wrong = wrong | ne(v, v);
        most = max(v, most);
      });
      top = max(most, top);
      store(best + start / kDealt, most);
    }
    return any_lane(wrong) ? std::numeric_limits<float>::quiet_NaN() : max_lanes(top);
  }

  // A key that at least `wanted` hands have an element above or at, and not many more. If fewer
  // hands have any but minus infinity, which has no weight, the least key above that.
  static int32_t common_floor(const float* best, int64_t hands, int64_t wanted) {
    int64_t low = key_of(-std::numeric_limits<float>::infinity()) + 1;
    int64_t high = INT32_MAX;
    while (high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      i32x16 above = splat_int<i32x16>(0);
      for (int64_t i = 0; i < hands; i += kLanes) {
        above = above - ge(keys_of(load(best + i)), splat_int<i32x16>(static_cast<int32_t>(middle)));
      }
      const int64_t count = static_cast<int64_t>(sum_lanes(to_float_value(above)));
      (count >= wanted ? low : high) = middle;
      if (count >= wanted && 2 * count <= 3 * wanted) break;
    }
    return static_cast<int32_t>(low);
  }

  // Every element whose key is at least the floor, in order; false where there are too many.
  template <class Row>
  bool collect(const Row& x, int64_t width, const float* best) {
    const i32x16 least = splat_int<i32x16>(floor_);
    for (int64_t start = 0; start < width; start += kDeal) {
      if (!any_lane(ge(keys_of(load(best + start / kDealt)), least))) continue;
      const int64_t end = start + kDeal < width ? start + kDeal : width;
      for (int64_t i = start; i < end; i += kLanes) {
        const int64_t n = end - i < kLanes ? end - i : kLanes;
        const i32x16 keys = keys_of(x.group(i, n));
        if (!any_lane(ge(keys, least))) continue;
        const Lanes lanes = lanes_of(from_bits(keys));
        for (int64_t lane = 0; lane < n; ++lane) {
          const int32_t key = bits_of(lanes.x[lane]);
          if (key < floor_) continue;
          if (num_found_ == kRoom) return false;
          found_[num_found_] = key;
          found_places_[num_found_++] = static_cast<int32_t>(i + lane);
        }
      }
    }
    return true;
  }

  // Of what was found the `count` greatest, in order.
  void keep_count(int count) {
    int64_t low = floor_;  // the least key that is kept
    for (int64_t high = INT32_MAX; high - low > 1;) {
      const int64_t middle = (low + high) >> 1;
      (count_found(static_cast<int32_t>(middle)) >= count ? low : high) = middle;
    }
    int64_t equal = count - count_found(static_cast<int32_t>(low + 1));
    for (int i = 0; i < num_found_; ++i) {
      if (found_[i] < low || (found_[i] == low && equal-- <= 0)) continue;
      keys_[count_] = found_[i];
      places_[count_++] = found_places_[i];
    }
  }

  template <class Row>
  void weigh(const Row& x, double temperature) {
    const Weigh weigh(top_, temperature);
    for (int i = 0; i < count_; ++i) weights_[i] = x.at(places_[i]);
    for_each_group(count_, [&](int64_t i, int64_t n) {
      store_group(weights_ + i, weigh(load_group(weights_ + i, n)), n);
    });
  }

  int64_t count_found(int32_t least) const {
    int64_t count = 0;
    for (int i = 0; i < num_found_; ++i) count += found_[i] >= least ? 1 : 0;
    return count;
  }
  // How many of the row have a key of at least `least`. Below the floor it is not known, but more
  // than are sorted.
  int64_t count_from(int32_t least) const { return least < floor_ ? INT32_MAX : count_found(least); }

  // The end of the elements that are in one block of the row with element i.
  int block_end(int i) const {
    const int64_t block = places_[i] / kWeightBlock;
    while (i < count_ && places_[i] / kWeightBlock == block) ++i;
    return i;
  }
  double sum_block(int begin, int end, int32_t least) const {
    if (end == begin + 1) return keys_[begin] >= least ? static_cast<double>(weights_[begin]) : 0.0;
    Lanes lanes{};
    for (int i = begin; i < end; ++i) {
      if (keys_[i] >= least) lanes.x[places_[i] % kLanes] += weights_[i];
    }
    return static_cast<double>(sum_lanes(load(lanes.x)));
  }
  // The weight of all whose key is at least `least`.
  double sum_from(int32_t least) const {
    double sum = 0.0;
    for (int i = 0; i < count_;) {
      const int end = block_end(i);
      sum += sum_block(i, end, least);
      i = end;
    }
    return sum;
  }

  // Takes the weight of all that comes behind the element of this key and place.
  void cut(int32_t key, int32_t place) {
    for (int i = 0; i < count_; ++i) {
      if (keys_[i] < key || (keys_[i] == key && places_[i] > place)) weights_[i] = 0.0f;
    }
  }

  float top_ = 0.0f;
  bool is_valid_ = false;
  bool is_whole_ = false;
  int32_t floor_ = 0;
  int num_found_ = 0;
  int32_t found_[kRoom];  // keys of candidates, all that are at least the floor
  int32_t found_places_[kRoom];
  int count_ = 0;
  int32_t keys_[kMost];  // of what is kept, in the order of the row
  int32_t places_[kMost];
  float weights_[kMost];
};

}  // namespace infc
