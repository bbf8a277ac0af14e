// Checks of an op's arguments: throws Error with the view's name, what was expected and what found.
#pragma once

#include "base/error.h"
#include "tensor/tensor.h"

namespace longtake {

inline void expect_shape(const char* name, const View& view, const Shape& shape) {
  if (view.shape() == shape) return;
  throw Error(str(name, ": expected ", shape.to_string(), ", found ", view.shape().to_string()));
}

inline void expect_rank(const char* name, const View& view, int rank) {
  if (view.shape().rank() == rank) return;
  throw Error(str(name, ": expected ", rank, " axes, found ", view.shape().to_string()));
}

inline void expect_dtype(const char* name, const View& view, DType dtype) {
  if (view.dtype() == dtype) return;
  throw Error(str(name, ": expected ", name_of(dtype), ", found ", name_of(view.dtype())));
}

// f32 or bf16.
inline void expect_float(const char* name, const View& view) {
  if (view.dtype() == DType::kF32 || view.dtype() == DType::kBF16) return;
  throw Error(str(name, ": expected f32 or bf16, found ", name_of(view.dtype())));
}

}  // namespace longtake
