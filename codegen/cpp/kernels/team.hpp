// The team of threads that runs a step: the caller is thread 0, the others sleep between steps.
//
// Every kernel is called by all threads with the same arguments, takes its share of the work from
// `tid` and `size`, and returns without waiting; whoever calls it places the barriers.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infc {

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Flushes subnormals to zero while it lives, so that every thread computes alike.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

#if defined(__linux__)
// Keeps the calling thread on one CPU while it lives.
class StayOn {
 public:
  explicit StayOn(int cpu) {
    if (cpu < 0 || sched_getaffinity(0, sizeof saved_, &saved_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    moved_ = sched_setaffinity(0, sizeof one, &one) == 0;
  }
  ~StayOn() {
    if (moved_) sched_setaffinity(0, sizeof saved_, &saved_);
  }
  StayOn(const StayOn&) = delete;
  StayOn& operator=(const StayOn&) = delete;

 private:
  cpu_set_t saved_;
  bool moved_ = false;
};

// The first `count` CPUs that the calling thread may use. Throws where there are fewer.
inline std::vector<int> allowed_cpus(int count) {
  cpu_set_t allowed;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE && static_cast<int>(cpus.size()) < count; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
    }
  }
  if (static_cast<int>(cpus.size()) < count) {
    throw std::invalid_argument("more threads are to be pinned than there are CPUs for them");
  }
  return cpus;
}
#else
class StayOn {
 public:
  explicit StayOn(int) {}
};
inline std::vector<int> allowed_cpus(int) {
  throw std::invalid_argument("threads cannot be pinned on this system");
}
#endif

// A counter that threads wait on: they spin for a moment, giving way in between, then sleep.
class Gate {
 public:
  explicit Gate(std::chrono::nanoseconds spin) : spin_(spin) {}

  uint32_t now() const { return count_.load(std::memory_order_acquire); }

  // Moves the counter on and wakes who sleeps.
  void advance() {
    count_.fetch_add(1);
    if (sleepers_.load() > 0) {
      // Taken and dropped: a sleeper has then either seen the count or is inside wait().
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
  }

  // Returns once the counter differs from `seen`.
  void wait_past(uint32_t seen) {
    if (spin_.count() > 0 && spin_past(seen)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return count_.load() != seen; });
    sleepers_.fetch_sub(1);
  }

 private:
  bool spin_past(uint32_t seen) const {
    const auto deadline = std::chrono::steady_clock::now() + spin_;
    do {
      for (int i = 0; i < 64; ++i) {
        if (now() != seen) return true;
        cpu_relax();
      }
      // Whom we wait for may sit behind us on this very core: another program took the other one,
      // or the system put two of the team on one. Spinning on would hold it up.
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    return now() != seen;
  }

  alignas(64) std::atomic<uint32_t> count_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::chrono::nanoseconds spin_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// What the threads of one team share.
struct TeamState {
  TeamState(int threads, std::chrono::nanoseconds spin) : size(threads), gate(spin) {}
  int size;
  Gate gate;
  alignas(64) std::atomic<int> arrived{0};
};

// One thread's view of the team, handed to every kernel.
struct Team {
  int tid;
  int size;
  std::byte* scratch;  // this thread's own, 64-byte aligned
  size_t scratch_bytes;
  TeamState* state;

  // Returns once all threads have called it; what they wrote before is then visible to all.
  void barrier() const {
    if (size == 1) return;
    const uint32_t seen = state->gate.now();
    if (state->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      state->arrived.store(0, std::memory_order_relaxed);
      state->gate.advance();
    } else {
      state->gate.wait_past(seen);
    }
  }
};

// The range of `count` items that a thread of the team takes: contiguous, sizes differing by 1.
struct Share {
  int64_t begin;
  int64_t end;
};
inline Share share_of(const Team& t, int64_t count) {
  return {count * t.tid / t.size, count * (t.tid + 1) / t.size};
}
// As above, with all boundaries but the last at multiples of `grain`.
inline Share share_of(const Team& t, int64_t count, int64_t grain) {
  const Share s = share_of(t, (count + grain - 1) / grain);
  const int64_t end = s.end * grain;
  return {s.begin * grain, end < count ? end : count};
}

// Owns the threads. Not copyable; destroyed by the thread that made it, when no run is under way.
class ThreadTeam {
 public:
  using Job = void (*)(const Team&, void*);

  // `threads` >= 1 in all, each with `scratch_bytes` of scratch. With `pin` thread i runs on the
  // i-th CPU that the caller may use: the caller itself for as long as a run lasts. Throws
  // std::bad_alloc, std::system_error or std::invalid_argument if memory, threads or CPUs can't
  // be had.
  ThreadTeam(int threads, size_t scratch_bytes, bool pin = false)
      : state_(threads, spin_time(threads)), start_(spin_time(threads)) {
    cpus_ = pin ? allowed_cpus(threads) : std::vector<int>(static_cast<size_t>(threads), -1);
    const size_t rounded = (scratch_bytes + 4095) / 4096 * 4096 + 4096;
    for (int i = 0; i < threads; ++i) {
      scratch_.emplace_back(static_cast<std::byte*>(std::aligned_alloc(4096, rounded)));
      if (!scratch_.back()) throw std::bad_alloc();
    }
    scratch_bytes_ = rounded;
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~ThreadTeam() { stop(); }
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return state_.size; }

  // Runs job(team, argument) on all threads and returns when each has finished.
  // One run at a time; subnormals are flushed while it lasts.
  void run(Job job, void* argument) {
    job_ = job;
    argument_ = argument;
    if (state_.size > 1) start_.advance();
    const StayOn stay(cpus_[0]);
    const FlushSubnormals flush;
    const Team team = view(0);
    job(team, argument);
    team.barrier();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };

  // Spinning helps only if each thread has a core of its own.
  static std::chrono::nanoseconds spin_time(int threads) {
    const unsigned cores = std::thread::hardware_concurrency();
    const bool crowded = cores != 0 && static_cast<unsigned>(threads) > cores;
    return std::chrono::microseconds(crowded ? 0 : 50);
  }

  Team view(int tid) {
    return Team{tid, state_.size, scratch_[static_cast<size_t>(tid)].get(), scratch_bytes_, &state_};
  }

  void work(int tid) {
    const StayOn stay(cpus_[static_cast<size_t>(tid)]);
    const FlushSubnormals flush;
    const Team team = view(tid);
    for (uint32_t seen = 0;; ++seen) {
      start_.wait_past(seen);
      if (stopping_) return;
      job_(team, argument_);
      team.barrier();
    }
  }

  void stop() {
    stopping_ = true;
    start_.advance();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  TeamState state_;
  Gate start_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;
  size_t scratch_bytes_ = 0;
  std::vector<int> cpus_;  // of each thread; -1 for any
  std::vector<std::unique_ptr<std::byte, Free>> scratch_;
  std::vector<std::thread> workers_;
};

}  // namespace infc
