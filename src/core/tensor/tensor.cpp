#include "tensor/tensor.h"

#include <cstring>

namespace longtake {

View View::rows(int64_t begin, int64_t end) const {
  LONGTAKE_CHECK(shape_.rank() > 0 && begin >= 0 && begin <= end && end <= shape_[0], "rows ",
                 begin, "..", end, " of ", shape_.to_string());
  const int64_t row = shape_[0] == 0 ? 0 : shape_.numel() / shape_[0];
  Shape shape = shape_;
  shape[0] = end - begin;
  return View(data_ + static_cast<size_t>(begin * row) * size_of(dtype_), dtype_, device_, shape);
}

Tensor::Tensor(Device device, DType dtype, const Shape& shape)
    : buffer_(device, static_cast<size_t>(shape.numel()) * size_of(dtype)),
      view_(buffer_.data(), dtype, device, shape) {}

Tensor Tensor::zeros(Device device, DType dtype, const Shape& shape) {
  Tensor out(device, dtype, shape);
  if (out.bytes() > 0) std::memset(out.view_.raw(), 0, out.bytes());
  return out;
}

Tensor Tensor::clone() const {
  Tensor out(view_.device(), view_.dtype(), view_.shape());
  if (bytes() > 0) std::memcpy(out.view_.raw(), view_.raw(), bytes());
  return out;
}

}  // namespace longtake
