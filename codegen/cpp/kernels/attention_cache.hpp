// Where attention finds a sequence's keys and values, a strip of the cache at a time.
#pragma once

#include "kv.hpp"

namespace infc {

constexpr int kStripGroups = 4;  // groups of 16 positions that rows meet while they are near, at most
constexpr int64_t kStripBytes = 16 << 10;  // of keys or values, at most where D allows it

INFC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INFC_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The positions [first, last) that a row attends to.
struct Span {
  int64_t first;
  int64_t last;
};

// Keys or values of some positions, by groups of 16. A group of keys has `stride` elements from one
// d to the next, one of values from one position to the next.
template <class T>
struct Strip {
  int groups;
  const T* at[kStripGroups];
  const T* ahead[kStripGroups];      // of the strip that follows
  const float* scale[kStripGroups];  // of keys that are codes, or null
  int64_t stride;

  // Once is enough: asking again would drive this strip away while more rows meet it.
  INFC_INLINE void was_asked_ahead() {
    for (int g = 0; g < groups; ++g) ahead[g] = at[g];
  }
};

// The cache of one (sequence, KV head).
template <class TC>
class HeadCache {
 public:
  // Positions from `end` on are never read.
  HeadCache(const KvView& kv, const int32_t* table, int64_t head, int64_t end)
      : kv_(kv), table_(table), head_(head), end_(end) {}

  INFC_INLINE const KvView& view() const { return kv_; }

  // Positions of a strip of keys (`size` is D) or values (Dv).
  INFC_INLINE static int64_t strip_positions(int64_t size) {
    const int64_t groups = kStripBytes / (kLanes * size * static_cast<int64_t>(sizeof(TC)));
    return kLanes * most(1, least(groups, kStripGroups));
  }

  // The strip that starts at `begin`, a multiple of 16, and goes no further than `end`.
  INFC_INLINE Strip<TC> keys(int64_t begin, int64_t end) const {
    Strip<TC> strip =
        strip_of(begin, end, strip_positions(kv_.D), [&](int64_t block, int64_t offset) {
          return key_at<TC>(kv_, block, head_, offset);
        });
    strip.stride = kv_.block_size;
    each_group(begin, strip.groups, [&](int g, int64_t block, int64_t offset) {
      strip.scale[g] = kHoldsCodes<TC> ? key_scale_at(kv_, block, head_, offset) : nullptr;
    });
    return strip;
  }
  INFC_INLINE Strip<TC> values(int64_t begin, int64_t end) const {
    Strip<TC> strip =
        strip_of(begin, end, strip_positions(kv_.Dv), [&](int64_t block, int64_t offset) {
          return value_at<TC>(kv_, block, head_, offset);
        });
    strip.stride = kv_.Dv;
    return strip;
  }
  INFC_INLINE const float* value_scale(int64_t position) const {
    return value_scale_at(kv_, table_[position / kv_.block_size], head_, position % kv_.block_size);
  }

 private:
  template <class At>
  INFC_INLINE Strip<TC> strip_of(int64_t begin, int64_t end, int64_t positions, At at) const {
    Strip<TC> strip;
    strip.groups = static_cast<int>(ceil_groups(least(end - begin, positions)));
    each_group(begin, strip.groups, [&](int g, int64_t block, int64_t offset) {
      strip.at[g] = at(block, offset);
    });
    each_group(begin + positions, strip.groups, [&](int g, int64_t block, int64_t offset) {
      strip.ahead[g] = at(block, offset);
    });
    return strip;
  }

  // Calls f(g, block, offset in it) for groups from `begin` on; what lies past the end is the last
  // group again.
  template <class F>
  INFC_INLINE void each_group(int64_t begin, int groups, F f) const {
    // Of 32 bits: half the time for the division.
    const auto size = static_cast<uint32_t>(kv_.block_size);
    auto position = static_cast<uint32_t>(begin < end_ ? begin : (end_ - 1) / kLanes * kLanes);
    uint32_t block = position / size;
    uint32_t offset = position % size;
    for (int g = 0; g < groups; ++g) {
      f(g, table_[block], offset);
      position += kLanes;
      if (position >= end_) continue;
      offset += kLanes;
      if (offset < size) continue;
      offset = 0;
      ++block;
    }
  }

  const KvView& kv_;
  const int32_t* table_;  // the sequence's block ids
  int64_t head_;
  int64_t end_;
};

}  // namespace infc
