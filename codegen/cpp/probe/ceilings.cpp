// What this machine can do at best: bytes read from memory, and products on registers alone.
//
// Built for a target with the flags of a generated step, so the instructions are those that the
// kernels have; ../ceilings.py builds and calls it.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>

#include "kernels/simd_memory.hpp"
#include "kernels/team.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define INFC_REGISTER "v"
#else
#define INFC_REGISTER "w"
#endif

using namespace infc;

namespace {

volatile float sink;

template <class F>
void on_team(ThreadTeam& team, F f) {
  team.run([](const Team& t, void* g) { (*static_cast<F*>(g))(t); }, &f);
}

// Seconds of the fastest of several calls: other work on the machine only ever adds.
template <class F>
double best_of(int64_t rounds, F f) {
  double best = 1e30;
  for (int64_t i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

// Anonymous memory, in huge pages where the kernel gives them, as the KV cache and the arena are.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return;
    data_ = static_cast<float*>(p);
#if defined(MADV_HUGEPAGE)
    (void)madvise(p, bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Memory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  float* data() const { return data_; }

 private:
  size_t bytes_;
  float* data_ = nullptr;
};

constexpr int64_t kLine = 64 / sizeof(float);
// Lines ahead of the read, in bytes: far enough for memory, near enough to stay in the first cache.
constexpr int64_t kAheadBytes = 2048;

// Reads `lines` cache lines as streams that lie behind each other.
template <int kStreams>
f32x16 read_streams(const float* p, int64_t lines) {
  const int64_t each = lines / kStreams;
  f32x16 acc[kStreams];
  for (f32x16& a : acc) a = zeros();
  for (int64_t i = 0; i < each; ++i) {
    INFC_UNROLL for (int s = 0; s < kStreams; ++s) {
      const float* line = p + (s * each + i) * kLine;
      __builtin_prefetch(reinterpret_cast<const char*>(line) + kAheadBytes);
      acc[s] = acc[s] + load(line);
    }
  }
  for (int s = 1; s < kStreams; ++s) acc[0] = acc[0] + acc[s];
  return acc[0];
}

template <int kStreams>
double read_seconds(ThreadTeam& team, const float* p, int64_t lines, int64_t rounds) {
  return best_of(rounds, [&] {
    on_team(team, [&](const Team& t) {
      const Share share = share_of(t, lines);
      sink = sum_lanes(read_streams<kStreams>(p + share.begin * kLine, share.end - share.begin));
    });
  });
}

// The instructions that multiply and add; `kOperations` is what one does in a 32-bit lane.

struct Float {
  using Vector = reg::f32;
  static constexpr double kOperations = 2;
  static Vector first() { return reg::f32{} + 0.001f; }
  static Vector add_product(Vector sum, Vector a) { return reg::fma(a, a, sum); }
};

#if INFC_DPBF16
struct PairsOfBf16 {
  using Vector = reg::f32;
  static constexpr double kOperations = 4;
  static Vector first() { return reg::f32{} + 0.001f; }
  static Vector add_product(Vector sum, Vector a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a);
  }
};
#else
using PairsOfBf16 = Float;  // bf16 is widened, and computed as float
#endif

struct Bytes {
  using Vector = reg::i32;
  static Vector first() { return reg::i32{} + 0x01020304; }
#if INFC_VNNI
  static constexpr double kOperations = 8;
  static Vector add_product(Vector sum, Vector a) {
    return (Vector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)a);
  }
#elif defined(__SSE2__)
  // Bytes are widened to 16 bits first: vpmaddubsw would saturate.
  static constexpr double kOperations = 4;
  static Vector add_product(Vector sum, Vector a) {
#if INFC_AVX512
    return sum + (Vector)_mm512_madd_epi16((__m512i)a, (__m512i)a);
#elif INFC_AVX2
    return sum + (Vector)_mm256_madd_epi16((__m256i)a, (__m256i)a);
#else
    return sum + (Vector)_mm_madd_epi16((__m128i)a, (__m128i)a);
#endif
  }
#else
  static constexpr double kOperations = 2;
  static Vector add_product(Vector sum, Vector a) { return sum + a * a; }
#endif
};

// Sums enough to fill the pipelines, few enough to stay in registers.
constexpr int kSums = INFC_AVX512 ? 24 : 12;

template <class Unit>
double operations_per_second(ThreadTeam& team, int64_t products, int64_t rounds) {
  using Vector = typename Unit::Vector;
  const int64_t steps = products / kSums;
  const double seconds = best_of(rounds, [&] {
    on_team(team, [&](const Team&) {
      Vector sums[kSums] = {};
      Vector a = Unit::first();
      for (int j = 0; j < kSums; ++j) sums[j][0] += j;  // equal sums could be made one
      for (int64_t i = 0; i < steps; ++i) {
        // Holds the compiler from taking the product once for all.
        INFC_UNROLL for (int j = 0; j < kSums; ++j) {
          __asm__ volatile("" : "+" INFC_REGISTER(a));
          sums[j] = Unit::add_product(sums[j], a);
        }
      }
      for (int j = 1; j < kSums; ++j) sums[0] = sums[0] + sums[j];
      sink = static_cast<float>(sums[0][0]);
    });
  });
  const double each = Unit::kOperations * kRegLanes;
  return each * static_cast<double>(steps * kSums * team.size()) / seconds;
}

}  // namespace

// Bytes a second that `threads` threads read together of `bytes` bytes, with the best of several
// numbers of streams; 0 where there is no such memory.
EXPORT double read_rate(int64_t threads, int64_t bytes, int64_t rounds) {
  const Memory memory(bytes);
  float* const p = memory.data();
  if (p == nullptr) return 0;
  ThreadTeam team(static_cast<int>(threads), 0);
  const int64_t lines = bytes / 64;
  on_team(team, [&](const Team& t) {  // each thread's share lies near it
    const Share share = share_of(t, lines);
    std::fill(p + share.begin * kLine, p + share.end * kLine, 1.0f);
  });
  const double seconds = std::min({
      read_seconds<1>(team, p, lines, rounds),
      read_seconds<2>(team, p, lines, rounds),
      read_seconds<4>(team, p, lines, rounds),
      read_seconds<8>(team, p, lines, rounds),
  });
  return static_cast<double>(bytes) / seconds;
}

// Operations a second of `threads` threads; `kind`: 0 float, 1 bf16, 2 int8. A product and a sum
// are two.
EXPORT double product_rate(int64_t threads, int64_t kind, int64_t products, int64_t rounds) {
  ThreadTeam team(static_cast<int>(threads), 0);
  switch (kind) {
    case 0: return operations_per_second<Float>(team, products, rounds);
    case 1: return operations_per_second<PairsOfBf16>(team, products, rounds);
    default: return operations_per_second<Bytes>(team, products, rounds);
  }
}
