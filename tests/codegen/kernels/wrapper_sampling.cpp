// C entry points over the kernels that take tokens from logits: see wrapper.cpp.
#include "kernels/sampling.hpp"

EXPORT i64 scratch_bytes(i64 width) { return draw_scratch_bytes(width); }

// y [width] = x as the row of the adjustments says; whether x is valid.
EXPORT i64 adjust(void* team, const T* x, const infc_adjusted* rows, i64 row, const int32_t* bias_ids,
                  const float* bias, const int32_t* count_ids, const int32_t* counts,
                  const uint32_t* masks, i64 mask_words, float* y, i64 width) {
  const infc_adjustments a{rows, bias_ids, bias, count_ids, counts, masks, mask_words, 0};
  bool valid = false;
  on_team(team, [&](const Team&) { valid = adjust_row(x, a, rows[row], y, width); });
  return valid;
}

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

// The tokens of the draws from one row x [width], of which a mask is all that is adjusted.
EXPORT void draw_masked(void* team, const T* x, i64 width, const uint32_t* mask,
                        const infc_draw* draws, int32_t* tokens, i64 count) {
  const infc_adjusted row{0, 0, 0, 0, 0, 0, 1.0f, 0.0f, 0.0f};
  const infc_adjustments a{&row, nullptr, nullptr, nullptr, nullptr, mask, (width + 31) / 32, 1};
  on_team(team, [&](const Team& t) {
    for (i64 i = 0; i < count; ++i) {
      tokens[i] = draw_adjusted(x, width, draws[i], a, row, t.scratch);
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
