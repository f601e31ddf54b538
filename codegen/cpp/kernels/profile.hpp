// Where the time of a step goes, by statement of the generated function.
#pragma once

#include "team.hpp"

namespace infc {

// Thread 0's clock. Each mark adds the time since the last one to its entry, so that what waits at
// a barrier is told apart from what computes. Without a profile a mark is one branch, never taken.
class StepClock {
 public:
  // `profile`: [entries, 2], nanoseconds and times; null where nobody asks.
  StepClock(int64_t* profile, int tid) : profile_(tid == 0 ? profile : nullptr) {
    if (profile_ != nullptr) last_ = nanoseconds_now();
  }

  void mark(int64_t entry) {
    if (__builtin_expect(profile_ != nullptr, 0)) add(profile_ + 2 * entry);
  }

 private:
  // Not inlined: the step has hundreds of marks.
  __attribute__((noinline)) void add(int64_t* entry) {
    const int64_t now = nanoseconds_now();
    entry[0] += now - last_;
    entry[1] += 1;
    last_ = now;
  }

  int64_t* profile_;
  int64_t last_ = 0;
};

}  // namespace infc
