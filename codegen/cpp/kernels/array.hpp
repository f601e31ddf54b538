// A fixed number of elements that own their memory.
//
// What opens a library is read in every compilation: with the standard library's containers,
// threads and strings that took 0.7 s of each, so they are not used in this directory.
#pragma once

#include <cstddef>

namespace infc {

template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size), items_(new T[size]()) {}
  Array(const T* first, size_t size) : Array(size) {
    for (size_t i = 0; i < size; ++i) items_[i] = first[i];
  }
  ~Array() { delete[] items_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  size_t size() const { return size_; }
  T* data() { return items_; }
  T& operator[](size_t i) { return items_[i]; }
  const T& operator[](size_t i) const { return items_[i]; }

 private:
  size_t size_;
  T* items_;
};

}  // namespace infc
