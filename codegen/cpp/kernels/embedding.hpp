// Rows of an embedding table, row-major or in the packed layout of linear (tied weights).
#pragma once

#include "linear_tile.hpp"
#include "team.hpp"

namespace infc {

// y[r, :] = table[ids[r], :] for r < rows; both contiguous, `dim` wide. ids must be in range.
template <class T, class Id>
void embedding_rows(const Team& t, const T* table, const Id* ids, T* y, int64_t rows, int64_t dim) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    std::memcpy(y + r * dim, table + static_cast<int64_t>(ids[r]) * dim,
                static_cast<size_t>(dim) * sizeof(T));
  }
}

// As embedding_rows, from a table [vocabulary, dim] packed as a linear weight.
template <class T, class Id>
void embedding_packed(const Team& t, const void* packed, const Id* ids, T* y, int64_t rows,
                      int64_t dim) {
  constexpr int kNR = LinearLayout<T>::kNR;
  constexpr int kKP = LinearLayout<T>::kKP;
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    const int64_t id = static_cast<int64_t>(ids[r]);
    const char* panel = static_cast<const char*>(packed) + id / kNR * panel_bytes<T>(dim);
    const T* source = reinterpret_cast<const T*>(panel) + id % kNR * kKP;
    T* out = y + r * dim;
    for (int64_t k = 0; k < dim; ++k) out[k] = source[k / kKP * kNR * kKP + k % kKP];
  }
}

// y[r, :] = x[index[r], :], row strides ldx and ldy.
template <class T, class Id>
void take_rows(const Team& t, const T* x, int64_t ldx, const Id* index, T* y, int64_t ldy,
               int64_t rows, int64_t dim) {
  const Share share = share_of(t, rows);
  for (int64_t r = share.begin; r < share.end; ++r) {
    std::memcpy(y + r * ldy, x + static_cast<int64_t>(index[r]) * ldx,
                static_cast<size_t>(dim) * sizeof(T));
  }
}

}  // namespace infc
