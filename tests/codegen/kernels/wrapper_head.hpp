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

// What plan_split makes of a step: pieces, rows, rows of a unit, slots.
EXPORT void split_plan(const int32_t* query_starts, const int32_t* positions, i64 B, i64 G,
                       i64 heads, i64 window, i64 threads, i64* out) {
  const StepView step{query_starts, positions, nullptr, 0, B, query_starts[B]};
  const AttentionLayout layout(step, G, heads, window);
  const SplitPlan plan = plan_split(layout, static_cast<int>(threads));
  out[0] = plan.pieces;
  out[1] = plan.rows;
  out[2] = plan.unit_rows;
  out[3] = plan.slots;
}

