// Tensor owns memory and only moves; View borrows it and is passed by value. Both are dense and
// row-major.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/dtype.h"
#include "base/error.h"
#include "base/shape.h"
#include "device/buffer.h"

namespace longtake {

class View {
 public:
  View() = default;

  View(void* data, DType dtype, Device device, const Shape& shape)
      : data_(static_cast<std::byte*>(data)), dtype_(dtype), device_(device), shape_(shape) {}

  DType dtype() const { return dtype_; }

  Device device() const { return device_; }

  const Shape& shape() const { return shape_; }

  int64_t dim(int axis) const { return shape_[axis]; }

  int64_t numel() const { return data_ ? shape_.numel() : 0; }

  size_t bytes() const { return static_cast<size_t>(numel()) * size_of(dtype_); }

  bool empty() const { return numel() == 0; }

  std::byte* raw() const { return data_; }

  // The elements; T must be the view's own type.
  template <typename T>
  T* data() const {
    LONGTAKE_CHECK(dtype_of<T> == dtype_, "view is ", name_of(dtype_), ", asked for ",
                   name_of(dtype_of<T>));
    return reinterpret_cast<T*>(data_);
  }

  // The same elements under another shape.
  View reshape(const Shape& shape) const {
    LONGTAKE_CHECK(shape.numel() == shape_.numel(), shape_.to_string(), " -> ", shape.to_string());
    return View(data_, dtype_, device_, shape);
  }

  // Rows [begin, end) of the first axis.
  View rows(int64_t begin, int64_t end) const;

 private:
  std::byte* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Device device_;
  Shape shape_;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(Device device, DType dtype, const Shape& shape);  // uninitialised

  static Tensor zeros(Device device, DType dtype, const Shape& shape);
  // On the CPU, for traffic with `device`; uninitialised.
  static Tensor staging(Device device, DType dtype, const Shape& shape);

  View view() const { return view_; }

  operator View() const {
    return view_;
  }  // NOLINT(google-explicit-constructor): a Tensor is usable wherever a View is

  const Shape& shape() const { return view_.shape(); }

  DType dtype() const { return view_.dtype(); }

  int64_t dim(int axis) const { return view_.dim(axis); }

  int64_t numel() const { return view_.numel(); }

  size_t bytes() const { return view_.bytes(); }

  bool empty() const { return view_.empty(); }

  template <typename T>
  T* data() const {
    return view_.data<T>();
  }

  // Copies that are there when the call returns.
  Tensor clone() const { return to(view_.device()); }

  Tensor to(Device device) const;

 private:
  Tensor(DType dtype, const Shape& shape, Buffer buffer)
      : buffer_(std::move(buffer)), view_(buffer_.data(), dtype, buffer_.device(), shape) {}

  Buffer buffer_;
  View view_;
};

}  // namespace longtake
