// Element types of tensors. Ops take f32, bf16 and, as weights, i8; the others are what files hold.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace longtake {

enum class DType : uint8_t { kF32, kBF16, kI8, kU8, kI32, kF64, kF16, kI64, kI16, kBool };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
    case DType::kI16:
      return 2;
    case DType::kI8:
    case DType::kU8:
    case DType::kBool:
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
    case DType::kF64:
      return "f64";
    case DType::kF16:
      return "f16";
    case DType::kI64:
      return "i64";
    case DType::kI16:
      return "i16";
    case DType::kBool:
      return "bool";
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

// IEEE half precision, for files that store it; widening is exact.
struct f16 {
  uint16_t bits = 0;

  explicit operator float() const {
    constexpr int kMantissaBits = 10;
    constexpr float kDenormalUnit = 0x1p-24F;
    const uint32_t sign = (bits & 0x8000U) << 16;
    const uint32_t exponent = (bits >> kMantissaBits) & 31U;
    const uint32_t mantissa = bits & 1023U;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * kDenormalUnit;
      return sign != 0 ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 127 - 15;
    return std::bit_cast<float>(sign | (wide << 23) | (mantissa << (23 - kMantissaBits)));
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

template <>
struct dtype_of_type<int64_t> {
  static constexpr DType value = DType::kI64;
};

template <typename T>
inline constexpr DType dtype_of = dtype_of_type<T>::value;

}  // namespace longtake
