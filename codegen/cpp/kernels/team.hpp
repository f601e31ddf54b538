// The team of threads that runs a step: the caller is thread 0, the others sleep between steps.
//
// Every kernel is called by all threads with the same arguments, takes its share of the work from
// `tid` and `size`, and returns without waiting, or says that it has barriers inside; whoever calls
// it places the others.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#include "array.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace infc {

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What floating-point instructions do beside computing, of the calling thread.
#if defined(__x86_64__)
constexpr uint64_t kFlushToZero = 0x8040;  // results, and operands too
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlushToZero = 1u << 24;
inline uint64_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
#error "subnormals must be flushed on every thread: say how this processor does"
#endif

// Flushes subnormals to zero while it lives, so that every thread computes alike.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(float_mode()) { set_float_mode(saved_ | kFlushToZero); }
  ~FlushSubnormals() { set_float_mode(saved_); }

 private:
  uint64_t saved_;
};

// Why a team can't be had.
class TeamError : public std::exception {
 public:
  explicit TeamError(const char* message) : message_(message) {}
  const char* what() const noexcept override { return message_; }

 private:
  const char* message_;  // a literal
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

// Fills `cpus` with the first CPUs that the calling thread may use. Throws where there are fewer.
inline void allowed_cpus(Array<int>& cpus) {
  cpu_set_t allowed;
  size_t found = 0;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE && found < cpus.size(); ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) cpus[found++] = cpu;
    }
  }
  if (found < cpus.size()) {
    throw TeamError("more threads are to be pinned than there are CPUs for them");
  }
}

// How many CPUs the calling thread may use; 0 if that can't be told.
inline int64_t num_allowed_cpus() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 0;
}
#else
class StayOn {
 public:
  explicit StayOn(int) {}
};
inline int64_t num_allowed_cpus() { return sysconf(_SC_NPROCESSORS_ONLN); }
inline void allowed_cpus(Array<int>&) {
  throw TeamError("threads cannot be pinned on this system");
}
#endif

// Nanoseconds of a clock that only goes forward.
inline int64_t nanoseconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

// What a waiting thread does where there is nothing to do.
struct Nothing {
  void operator()() const {}
};

// A counter that threads wait on: they spin for a moment, giving way in between, then sleep.
class Gate {
 public:
  explicit Gate(int64_t spin_ns) : spin_ns_(spin_ns) {}
  ~Gate() {
    pthread_cond_destroy(&wake_);
    pthread_mutex_destroy(&mutex_);
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  uint32_t now() const { return count_.load(std::memory_order_acquire); }

  // Moves the counter on and wakes who sleeps.
  void advance() {
    count_.fetch_add(1);
    if (sleepers_.load() > 0) {
      // Taken and dropped: a sleeper has then either seen the count or is inside the wait.
      pthread_mutex_lock(&mutex_);
      pthread_mutex_unlock(&mutex_);
      pthread_cond_broadcast(&wake_);
    }
  }

  // Returns once the counter differs from `seen`; calls idle() again and again while it spins.
  template <class Idle>
  void wait_past(uint32_t seen, Idle& idle) {
    if (spin_ns_ > 0 && spin_past(seen, idle)) return;
    pthread_mutex_lock(&mutex_);
    sleepers_.fetch_add(1);
    while (count_.load() == seen) pthread_cond_wait(&wake_, &mutex_);
    sleepers_.fetch_sub(1);
    pthread_mutex_unlock(&mutex_);
  }

 private:
  template <class Idle>
  bool spin_past(uint32_t seen, Idle& idle) const {
    const int64_t deadline = nanoseconds_now() + spin_ns_;
    do {
      for (int i = 0; i < 64; ++i) {
        if (now() != seen) return true;
        idle();
        cpu_relax();
      }
      // Whom we wait for may sit behind us on this very core: another program took the other one,
      // or the system put two of the team on one. Spinning on would hold it up.
      sched_yield();
    } while (nanoseconds_now() < deadline);
    return now() != seen;
  }

  alignas(64) std::atomic<uint32_t> count_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  int64_t spin_ns_;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
};

// What the threads of one team share.
struct TeamState {
  TeamState(int threads, int64_t spin_ns)
      : size(threads), scratch(static_cast<size_t>(threads)), gate(spin_ns) {}
  int size;
  Array<std::byte*> scratch;  // of each thread
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

  // Another thread's scratch: what it has left there, between barriers.
  std::byte* scratch_of(int thread) const { return state->scratch[static_cast<size_t>(thread)]; }

  // Returns once all threads have called it; what they wrote before is then visible to all.
  void barrier() const {
    Nothing nothing;
    barrier(nothing);
  }
  // As above; a thread that waits calls idle() meanwhile, which must be short.
  template <class Idle>
  void barrier(Idle& idle) const {
    if (size == 1) return;
    const uint32_t seen = state->gate.now();
    if (state->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      state->arrived.store(0, std::memory_order_relaxed);
      state->gate.advance();
    } else {
      state->gate.wait_past(seen, idle);
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
  // std::bad_alloc or TeamError if memory, threads or CPUs can't be had.
  ThreadTeam(int threads, size_t scratch_bytes, bool pin = false)
      : state_(threads, spin_ns(threads)),
        start_(spin_ns(threads)),
        scratch_bytes_((scratch_bytes + 4095) / 4096 * 4096 + 4096),
        members_(static_cast<size_t>(threads)) {
    Array<int> cpus(members_.size());
    if (pin) allowed_cpus(cpus);
    try {
      for (int tid = 0; tid < threads; ++tid) enlist(tid, pin ? cpus[size_t(tid)] : kAnyCpu);
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
    const StayOn stay(members_[0].cpu);
    const FlushSubnormals flush;
    const Team team = view(0);
    job(team, argument);
    team.barrier();
  }

 private:
  static constexpr int kAnyCpu = -1;

  struct Member {
    ThreadTeam* team;
    int tid;
    int cpu;
    bool started;  // never the caller's own
    pthread_t thread;
  };

  // Spinning helps only if each thread has a core of its own.
  static int64_t spin_ns(int threads) {
    const int64_t cpus = num_allowed_cpus();
    return cpus > 0 && threads > cpus ? 0 : 50000;
  }

  void enlist(int tid, int cpu) {
    Member& member = members_[static_cast<size_t>(tid)];
    member.team = this;
    member.tid = tid;
    member.cpu = cpu;
    void* scratch = std::aligned_alloc(4096, scratch_bytes_);
    if (scratch == nullptr) throw std::bad_alloc();
    state_.scratch[static_cast<size_t>(tid)] = static_cast<std::byte*>(scratch);
    if (tid == 0) return;
    member.started = pthread_create(&member.thread, nullptr, &ThreadTeam::work, &member) == 0;
    if (!member.started) throw TeamError("a thread of the team could not be started");
  }

  Team view(int tid) {
    return Team{tid, state_.size, state_.scratch[static_cast<size_t>(tid)], scratch_bytes_, &state_};
  }

  static void* work(void* argument) {
    const Member& member = *static_cast<Member*>(argument);
    const StayOn stay(member.cpu);
    const FlushSubnormals flush;
    member.team->serve(member.tid);
    return nullptr;
  }

  void serve(int tid) {
    const Team team = view(tid);
    for (uint32_t seen = 0;; ++seen) {
      Nothing nothing;
      start_.wait_past(seen, nothing);
      if (stopping_) return;
      job_(team, argument_);
      team.barrier();
    }
  }

  void stop() {
    stopping_ = true;
    start_.advance();
    for (size_t i = 0; i < members_.size(); ++i) {
      if (members_[i].started) pthread_join(members_[i].thread, nullptr);
      std::free(state_.scratch[i]);
    }
  }

  TeamState state_;
  Gate start_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;
  size_t scratch_bytes_;
  Array<Member> members_;
};

}  // namespace infc
