#include "ops/widen.h"

#include <cstring>

namespace longtake {

void widen(View data, View scale, View out) {
  auto* to = out.data<float>();
  const int64_t count = data.numel();
  switch (data.dtype()) {
    case DType::kF32:
      std::memcpy(to, data.raw(), data.bytes());
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(data.data<bf16>()[i]);
      return;
    case DType::kI8: {
      const int64_t row = count == 0 ? 1 : count / data.dim(0);
      for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<float>(data.data<int8_t>()[i]) * scale.data<float>()[i / row];
      return;
    }
    default:
      LONGTAKE_CHECK(false, "weight of dtype ", name_of(data.dtype()));
  }
}

}  // namespace longtake
