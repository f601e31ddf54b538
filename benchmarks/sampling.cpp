// Times taking tokens from rows of logits: see sampling.py.
#include <chrono>
#include <vector>

#include "kernels/sampling.hpp"

using namespace infc;

namespace {

volatile int32_t sink;

template <class F>
double seconds_of(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Seconds that one thread takes for all draws of a step from x [.., width]; `whole` weighs whole
// rows, whatever top-k keeps.
extern "C" __attribute__((visibility("default"))) double draw_seconds(const float* x, int64_t width,
                                                                       const infc_step* step,
                                                                       int64_t whole) {
  static ThreadTeam team(1, static_cast<size_t>(draw_scratch_bytes(width)));
  struct Call {
    const float* x;
    int64_t width;
    const infc_step* step;
    bool whole;
    double seconds;
  } call{x, width, step, whole != 0, 0.0};
  team.run(
      [](const Team& t, void* argument) {
        Call& c = *static_cast<Call*>(argument);
        c.seconds = seconds_of([&] {
          if (!c.whole) return draw_tokens(t, c.x, *c.step, c.width);
          for (int64_t i = 0; i < c.step->num_draws; ++i) {
            const infc_draw& draw = c.step->draws[i];
            const Logits<float> row{c.x + draw.row * c.width};
            c.step->tokens[i] = draw_of_all(row, c.width, draw, t.scratch);
          }
        });
      },
      &call);
  sink = step->tokens[0];
  return call.seconds;
}
