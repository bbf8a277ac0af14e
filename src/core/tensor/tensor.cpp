#include "tensor/tensor.h"

#include <cstring>

#include "build_config.h"
#include "device/cuda_device.h"

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
    : Tensor(dtype, shape, Buffer(device, static_cast<size_t>(shape.numel()) * size_of(dtype))) {}

Tensor Tensor::zeros(Device device, DType dtype, const Shape& shape) {
  Tensor out(device, dtype, shape);
  if (out.bytes() == 0) return out;
  if (device.kind == DeviceKind::kCpu) {
    std::memset(out.view_.raw(), 0, out.bytes());
  } else if constexpr (kHasCuda) {
    cuda::zero_bytes_now(out.view_.raw(), out.bytes());
  }
  return out;
}

Tensor Tensor::staging(Device device, DType dtype, const Shape& shape) {
  return {dtype, shape,
          Buffer::staging(device, static_cast<size_t>(shape.numel()) * size_of(dtype))};
}

Tensor Tensor::to(Device device) const {
  Tensor out(device, view_.dtype(), view_.shape());
  if (bytes() == 0) return out;
  const bool from_host = view_.device().kind == DeviceKind::kCpu;
  const bool to_host = device.kind == DeviceKind::kCpu;
  if (from_host && to_host) {
    std::memcpy(out.view_.raw(), view_.raw(), bytes());
  } else if constexpr (kHasCuda) {
    cuda::copy_bytes_now(view_.raw(), out.view_.raw(), bytes(),
                         from_host ? cuda::Direction::kToDevice
                         : to_host ? cuda::Direction::kToHost
                                   : cuda::Direction::kOnDevice);
  }
  return out;
}

}  // namespace longtake
