// Sizes of a tensor's axes, outermost first. Row-major: the last axis is contiguous.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/error.h"

namespace longtake {

class Shape {
 public:
  static constexpr int kMaxRank = 10;  // no model has more than five axes; files of others may

  Shape() = default;

  Shape(std::initializer_list<int64_t> sizes) {
    LONGTAKE_CHECK(sizes.size() <= kMaxRank);
    for (const int64_t size : sizes) sizes_[static_cast<size_t>(rank_++)] = size;
  }

  int rank() const { return rank_; }

  int64_t operator[](int axis) const {
    return sizes_[static_cast<size_t>(axis < 0 ? axis + rank_ : axis)];
  }

  int64_t& operator[](int axis) {
    return sizes_[static_cast<size_t>(axis < 0 ? axis + rank_ : axis)];
  }

  // Appends an innermost axis.
  void push_back(int64_t size) {
    LONGTAKE_CHECK(rank_ < kMaxRank);
    sizes_[static_cast<size_t>(rank_++)] = size;
  }

  // Number of elements; 1 for a scalar (rank 0).
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= (*this)[i];
    return n;
  }

  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; ++i) {
      if ((*this)[i] != other[i]) return false;
    }
    return true;
  }

  // "[128, 6, 64]"
  std::string to_string() const {
    std::string out = "[";
    for (int i = 0; i < rank_; ++i) out += (i ? ", " : "") + std::to_string((*this)[i]);
    return out + "]";
  }

 private:
  std::array<int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

}  // namespace longtake
