// What both wrappers begin with; harness.py puts it in front of them. ELEMENT is the element type.
#include "kernels/attention.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace infc;
using T = ELEMENT;
using i64 = int64_t;

namespace {

template <class F>
void on_team(void* team, F f) {
  static_cast<ThreadTeam*>(team)->run([](const Team& t, void* g) { (*static_cast<F*>(g))(t); }, &f);
}

// The cache of one group of layers as the tests lay it out.
KvView view(const i64* v) {
  return {reinterpret_cast<void*>(v[0]), v[1], v[2], static_cast<int32_t>(v[3]),
          static_cast<int32_t>(v[4]), static_cast<int32_t>(v[5]), static_cast<int32_t>(v[6])};
}

}  // namespace

EXPORT void* team_new(i64 threads, i64 scratch) {
  return new ThreadTeam(static_cast<int>(threads), static_cast<size_t>(scratch));
}
EXPORT void team_free(void* team) { delete static_cast<ThreadTeam*>(team); }

EXPORT i64 attention_scratch(i64 D, i64 Dv) { return attention_scratch_bytes(D, Dv); }
