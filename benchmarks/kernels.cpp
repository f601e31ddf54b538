// Times the kernels from inside one process: see kernels.py.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/linear.hpp"
#include "kernels/quantize.hpp"
#include "kernels/scaled_linear.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace infc;

namespace {

template <class F>
void on_team(ThreadTeam& team, F f) {
  team.run([](const Team& t, void* g) { (*static_cast<F*>(g))(t); }, &f);
}

// Seconds of the fastest of several calls: other work on the machine only ever adds.
template <class F>
double best_of(int repeats, F f) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

volatile float sink;

// Memory for weights as a step reads them: in huge pages where there are any.
class Weights {
 public:
  explicit Weights(int64_t bytes) : bytes_(static_cast<size_t>((bytes + kHuge - 1) / kHuge * kHuge)) {
    data_ = static_cast<char*>(std::aligned_alloc(kHuge, bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Weights() { std::free(data_); }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;
  size_t bytes_;
  char* data_;
};

template <class T>
double time_linear(ThreadTeam& team, int64_t M, int64_t N, int64_t K, int64_t matrices,
                   int repeats) {
  const int64_t bytes = packed_bytes<T>(N, K);
  Weights w(bytes * matrices);
  std::vector<T> x(static_cast<size_t>(M * K));
  std::vector<T> y(static_cast<size_t>(M * N));
  for (int64_t i = 0; i < bytes * matrices / static_cast<int64_t>(sizeof(T)); ++i) {
    w.as<T>()[i] = from_float<T>(static_cast<float>(i % 17) - 8.0f);
  }
  for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<T>(static_cast<float>(i % 13) - 6.0f);
  const double seconds = best_of(repeats, [&] {
    on_team(team, [&](const Team& t) {
      for (int64_t i = 0; i < matrices; ++i) {
        linear<T, T, T>(t, x.data(), K, w.as<char>() + i * bytes, static_cast<const T*>(nullptr),
                        y.data(), N, M, N, K);
        t.barrier();
      }
    });
  });
  sink = to_float(y[0]);
  return seconds / static_cast<double>(matrices);
}

// Rows are quantised before they are multiplied, and that is timed too.
template <class W>
double time_scaled_linear(ThreadTeam& team, int64_t M, int64_t N, int64_t K, int64_t matrices,
                          int repeats) {
  const int64_t bytes = packed_bytes<W>(N, K);
  Weights w(bytes * matrices);
  std::vector<float> scale(static_cast<size_t>(N), 0.01f);
  std::vector<bf16> x(static_cast<size_t>(M * K));
  std::vector<int8_t> q(x.size());
  std::vector<float> row_scale(static_cast<size_t>(M * RowScales<W>::count(K)));
  std::vector<bf16> y(static_cast<size_t>(M * N));
  for (int64_t i = 0; i < bytes * matrices; ++i) w.as<char>()[i] = static_cast<char>(i % 251);
  for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<bf16>(static_cast<float>(i % 13) - 6.0f);
  const double seconds = best_of(repeats, [&] {
    on_team(team, [&](const Team& t) {
      for (int64_t i = 0; i < matrices; ++i) {
        RowScales<W>::quantize(t, x.data(), K, q.data(), row_scale.data(), M, K);
        t.barrier();
        scaled_linear<W, bf16>(t, q.data(), K, row_scale.data(), w.as<char>() + i * bytes,
                               scale.data(), static_cast<const bf16*>(nullptr), y.data(), N, M, N, K);
        t.barrier();
      }
    });
  });
  sink = to_float(y[0]);
  return seconds / static_cast<double>(matrices);
}

struct AttentionShape {
  int64_t tokens;
  int64_t context;
  int64_t H;
  int32_t G;
  int32_t D;
  int64_t layers;  // each with a cache of its own, as a step meets them
};

// TC is the cache's type.
template <class T, class TC = T>
double time_attention(ThreadTeam& team, const AttentionShape& shape, int repeats) {
  const auto [tokens, context, H, G, D, layers] = shape;
  const int32_t bs = 16;
  const int64_t blocks = (context + bs - 1) / bs;
  const int64_t bytes = kv_layer_bytes<TC>(G, D, D, bs);
  Weights cache((blocks + 1) * bytes * layers);
  std::memset(cache.as<char>(), 0, static_cast<size_t>((blocks + 1) * bytes * layers));
  std::vector<T> q(static_cast<size_t>(tokens * H * D), from_float<T>(0.01f));
  std::vector<T> y(q.size());
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  std::vector<int32_t> positions(static_cast<size_t>(tokens));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i) + 1;
  for (size_t i = 0; i < positions.size(); ++i) {
    positions[i] = static_cast<int32_t>(context - tokens) + static_cast<int32_t>(i);
  }
  const int32_t starts[2] = {0, static_cast<int32_t>(tokens)};
  const StepView step{starts, positions.data(), table.data(), blocks, 1, tokens};
  const double seconds = best_of(repeats, [&] {
    on_team(team, [&](const Team& t) {
      for (int64_t layer = 0; layer < layers; ++layer) {
        const KvView kv{cache.as<char>(), bytes * layers, bytes * layer, bs, G, D, D};
        paged_attention<T, TC>(t, q.data(), H * D, y.data(), H * D, step, kv, H, 0.125f, 0, 0.0f,
                              static_cast<const float*>(nullptr));
        t.barrier();
      }
    });
  });
  return seconds / static_cast<double>(layers);
}

}  // namespace

using Int8 = Grouped<8, int8_t>;
using Int4 = Grouped<4, int8_t, absent, Levels::book>;
using Int6 = Grouped<6, int8_t>;

// `kind`: 0 float, 1 bf16, 2 int8, 3 int4, 4 int8-token, 5 int4-token, 6 int6.
EXPORT double linear_seconds(int64_t threads, int64_t kind, int64_t M, int64_t N, int64_t K,
                             int64_t matrices, int64_t repeats) {
  const int64_t scratch = std::max({product_scratch_bytes<float>(K), product_scratch_bytes<bf16>(K),
                                    product_scratch_bytes<Int8>(K), product_scratch_bytes<Int4>(K),
                                    product_scratch_bytes<int8_t>(K), product_scratch_bytes<Int6>(K),
                                    product_scratch_bytes<int4x2>(K)});
  ThreadTeam team(static_cast<int>(threads), static_cast<size_t>(scratch));
  const int r = static_cast<int>(repeats);
  switch (kind) {
    case 0: return time_linear<float>(team, M, N, K, matrices, r);
    case 1: return time_linear<bf16>(team, M, N, K, matrices, r);
    case 2: return time_scaled_linear<Int8>(team, M, N, K, matrices, r);
    case 3: return time_scaled_linear<Int4>(team, M, N, K, matrices, r);
    case 4: return time_scaled_linear<int8_t>(team, M, N, K, matrices, r);
    case 5: return time_scaled_linear<int4x2>(team, M, N, K, matrices, r);
    default: return time_scaled_linear<Int6>(team, M, N, K, matrices, r);
  }
}

// `kind`: as above; with int8 the cache holds codes and the queries are bf16.
EXPORT double attention_seconds(int64_t threads, int64_t kind, int64_t tokens, int64_t context,
                                int64_t H, int64_t G, int64_t D, int64_t layers, int64_t repeats) {
  ThreadTeam team(static_cast<int>(threads), static_cast<size_t>(attention_scratch_bytes(D, D)));
  const int r = static_cast<int>(repeats);
  const AttentionShape shape{tokens, context, H, static_cast<int32_t>(G), static_cast<int32_t>(D),
                             layers};
  switch (kind) {
    case 0: return time_attention<float>(team, shape, r);
    case 1: return time_attention<bf16>(team, shape, r);
    default: return time_attention<bf16, int8_t>(team, shape, r);
  }
}

EXPORT double barrier_seconds(int64_t threads) {
  ThreadTeam team(static_cast<int>(threads), 0);
  return best_of(5, [&] {
           on_team(team, [](const Team& t) {
             for (int i = 0; i < 1000; ++i) t.barrier();
           });
         }) /
         1000;
}
