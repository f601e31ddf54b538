// C entry points over the kernels that take tokens from logits: see wrapper.cpp.
#include "kernels/sampling.hpp"

EXPORT i64 scratch_bytes(i64 width) { return draw_scratch_bytes(width); }

// The tokens of the draws, whose rows are of x [.., width]; weighing whole rows, or as it is done.
EXPORT void draw(void* team, const T* x, i64 width, const infc_draw* draws, int32_t* tokens, i64 count,
                 i64 whole) {
  on_team(team, [=](const Team& t) {
    for (i64 i = 0; i < count; ++i) {
      const Logits<T> row{x + draws[i].row * width};
      tokens[i] = whole ? draw_of_all(row, width, draws[i], t.scratch)
                        : draw_token(row, width, draws[i], t.scratch);
    }
  });
}

// How many of the draws weigh only what top-k keeps.
EXPORT i64 num_short(void* team, const T* x, i64 width, const infc_draw* draws, i64 count) {
  i64 found = 0;
  on_team(team, [&](const Team& t) {
    for (i64 i = 0; i < count; ++i) {
      const infc_draw& d = draws[i];
      if (!TopShares::fits(d.top_k, width)) continue;
      const Logits<T> row{x + d.row * width};
      found += TopShares(row, width, d.top_k, d.temperature, t.scratch).is_whole();
    }
  });
  return found;
}
