// Element types of tensors.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace longtake {

enum class DType : uint8_t { kF32, kBF16, kI8, kU8, kI32 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kI8:
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kI8:
      return "i8";
    case DType::kU8:
      return "u8";
    case DType::kI32:
      return "i32";
  }
  return "?";
}

// The upper half of a float, rounded to nearest even on the way in; NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;

  bf16() = default;

  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const bool nan = (u & 0x7fffffffU) > 0x7f800000U;
    bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40U : (u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }

  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

template <typename T>
struct dtype_of_type;

template <>
struct dtype_of_type<float> {
  static constexpr DType value = DType::kF32;
};

template <>
struct dtype_of_type<bf16> {
  static constexpr DType value = DType::kBF16;
};

template <>
struct dtype_of_type<int8_t> {
  static constexpr DType value = DType::kI8;
};

template <>
struct dtype_of_type<uint8_t> {
  static constexpr DType value = DType::kU8;
};

template <>
struct dtype_of_type<int32_t> {
  static constexpr DType value = DType::kI32;
};

template <typename T>
inline constexpr DType dtype_of = dtype_of_type<T>::value;

}  // namespace longtake
