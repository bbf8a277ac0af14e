// A tensor as a weight file holds it: any element type, any strides, any alignment, in memory that
// is only read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "base/shape.h"
#include "tensor/tensor.h"

namespace longtake {

struct StoredTensor {
  std::string group;  // the top-level key it lies under ("generator_ema"); empty: none
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  Shape strides;  // in elements, not negative
  const std::byte* data = nullptr;

  int64_t numel() const { return shape.numel(); }

  size_t bytes() const { return static_cast<size_t>(numel()) * size_of(dtype); }

  // Whether the elements lie row-major without a gap, aligned to their size: view() then works.
  bool is_dense() const;

  // The file's own memory, not to be written.
  View view() const;

  // The tensor's memory may go until it is read again. A dense one of a mapped file.
  void release() const;
};

// Strides of a row-major tensor without gaps, in elements.
Shape dense_strides(const Shape& shape);

// Copies into `out` [same shape], row-major. out has the tensor's own type, or is f32 | bf16 and
// the tensor floating point (f64 and f32 are rounded to nearest, f16 and bf16 widen exactly).
void read_tensor(const StoredTensor& tensor, View out);

}  // namespace longtake
