// C entry points over the 8-bit kernel templates, for one element type, ELEMENT: see wrapper.cpp.
#include "kernels/linear_i8.hpp"
#include "kernels/quantize.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace infc;
using T = ELEMENT;
using i64 = int64_t;

namespace {

template <class F>
void on_team(void* team, F f) {
  static_cast<ThreadTeam*>(team)->run([](const Team& t, void* g) { (*static_cast<F*>(g))(t); }, &f);
}

}  // namespace

EXPORT void* team_new(i64 threads, i64 scratch) {
  return new ThreadTeam(static_cast<int>(threads), static_cast<size_t>(scratch));
}
EXPORT void team_free(void* team) { delete static_cast<ThreadTeam*>(team); }

EXPORT void layout(i64* out) {
  out[0] = LinearLayout<int8_t>::kNR;
  out[1] = LinearLayout<int8_t>::kKP;
  out[2] = INFC_VNNI;
}

EXPORT void quantize(void* team, const T* x, i64 ldx, int8_t* q, float* scale, i64 rows, i64 dim) {
  on_team(team, [=](const Team& t) { quantize_rows(t, x, ldx, q, scale, rows, dim); });
}

EXPORT void scaled_linear_rows(void* team, const int8_t* q, i64 ldq, const float* row_scale,
                               const void* w, const float* scale, const T* bias, T* y, i64 ldy,
                               i64 M, i64 N, i64 K) {
  on_team(team, [=](const Team& t) {
    scaled_linear<T>(t, q, ldq, row_scale, w, scale, bias, y, ldy, M, N, K);
  });
}
EXPORT void scaled_linear_float(void* team, const int8_t* q, i64 ldq, const float* row_scale,
                                const void* w, const float* scale, const T* bias, float* y, i64 ldy,
                                i64 M, i64 N, i64 K) {
  on_team(team, [=](const Team& t) {
    scaled_linear<float>(t, q, ldq, row_scale, w, scale, bias, y, ldy, M, N, K);
  });
}
