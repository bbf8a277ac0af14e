#include "io/stored_tensor.h"

#include <array>
#include <cstring>

#include "base/error.h"
#include "io/mapped_file.h"

namespace longtake {
namespace {

// Calls row(from, to, count, stride) for every innermost row: `from` its first element in the file,
// `to` the index of its first element in row-major order.
template <typename Row>
void for_each_row(const StoredTensor& tensor, const Row& row) {
  struct Axis {
    int64_t size = 1;
    int64_t stride = 1;
    int64_t index = 0;
  };

  std::array<Axis, Shape::kMaxRank + 1> axes;  // innermost first
  size_t rank = 0;
  for (int axis = tensor.shape.rank(); axis-- > 0;)
    axes[rank++] = {tensor.shape[axis], tensor.strides[axis]};
  const Axis inner = axes[0];
  const int64_t count = tensor.numel();
  int64_t from = 0;
  for (int64_t to = 0; to < count; to += inner.size) {
    row(from, to, inner.size, inner.stride);
    // The next row: the innermost outer axis that can still grow does, those inside it restart.
    for (size_t i = 1; i < rank; ++i) {
      Axis& axis = axes[i];
      from += axis.stride;
      if (++axis.index < axis.size) break;
      from -= axis.index * axis.stride;
      axis.index = 0;
    }
  }
}

template <typename From, typename To>
void convert_rows(const StoredTensor& tensor, To* out) {
  for_each_row(tensor, [&](int64_t from, int64_t to, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      From value;
      std::memcpy(&value, tensor.data + (from + i * stride) * int64_t{sizeof(From)}, sizeof value);
      out[to + i] = To(static_cast<float>(value));
    }
  });
}

template <typename To>
void convert_to(const StoredTensor& tensor, To* out) {
  switch (tensor.dtype) {
    case DType::kF64:
      return convert_rows<double>(tensor, out);
    case DType::kF32:
      return convert_rows<float>(tensor, out);
    case DType::kF16:
      return convert_rows<f16>(tensor, out);
    case DType::kBF16:
      return convert_rows<bf16>(tensor, out);
    default:
      LONGTAKE_CHECK(false, tensor.name, ": ", name_of(tensor.dtype), " is not floating point");
  }
}

void copy_rows(const StoredTensor& tensor, std::byte* out) {
  const auto size = static_cast<int64_t>(size_of(tensor.dtype));
  for_each_row(tensor, [&](int64_t from, int64_t to, int64_t count, int64_t stride) {
    if (stride == 1) {
      std::memcpy(out + to * size, tensor.data + from * size, static_cast<size_t>(count * size));
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(out + (to + i) * size, tensor.data + (from + i * stride) * size,
                  static_cast<size_t>(size));
  });
}

}  // namespace

bool StoredTensor::is_dense() const {
  return strides == dense_strides(shape) && reinterpret_cast<uintptr_t>(data) % size_of(dtype) == 0;
}

View StoredTensor::view() const {
  LONGTAKE_CHECK(is_dense(), name);
  return View(const_cast<std::byte*>(data), dtype, Device{}, shape);
}

void StoredTensor::release() const {
  if (is_dense()) MappedFile::release({data, bytes()});
}

Shape dense_strides(const Shape& shape) {
  Shape strides = shape;
  int64_t stride = 1;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
  return strides;
}

void read_tensor(const StoredTensor& tensor, View out) {
  LONGTAKE_CHECK(out.shape() == tensor.shape, out.shape().to_string(), " for ",
                 tensor.shape.to_string());
  if (out.dtype() == tensor.dtype) return copy_rows(tensor, out.raw());
  if (out.dtype() == DType::kBF16) return convert_to(tensor, out.data<bf16>());
  convert_to(tensor, out.data<float>());
}

}  // namespace longtake
