#include "metrics/page_math.h"

#include <array>

#include "device/dispatch.h"

namespace longtake {

void page_logits(const float* q, const KvPage& page, DType dtype, int64_t head_dim, double scale,
                 double* out) {
  std::array<double, kPageTokens> dots{};
  for_float_type(dtype, [&]<typename T>() {
    constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;  // channels side by side
    const T* keys = reinterpret_cast<const T*>(page.keys);
    for (int64_t d = 0; d < head_dim; d += kPair) {
      const T* row = keys + d * kPageTokens;
      for (int64_t pair = 0; pair < kPair; ++pair) {
        const double by = q[d + pair];
        for (size_t slot = 0; slot < dots.size(); ++slot)
          dots[slot] +=
              by * double{static_cast<float>(row[slot * kPair + static_cast<size_t>(pair)])};
      }
    }
  });
  for (int64_t slot = 0; slot < page.num_keys; ++slot)
    out[slot] = dots[static_cast<size_t>(slot)] * scale + double{page.bias[slot]};
}

void add_page_values(const double* weights, double least, const KvPage& page, DType dtype,
                     int64_t head_dim, double* out) {
  for_float_type(dtype, [&]<typename T>() {
    constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;  // keys side by side
    const T* values = reinterpret_cast<const T*>(page.values);
    for (int64_t slot = 0; slot < page.num_keys; ++slot) {
      const double weight = weights[slot];
      if (weight < least) continue;
      const T* row = values + slot / kPair * kPair * head_dim + slot % kPair;
      for (int64_t d = 0; d < head_dim; ++d)
        out[d] += weight * double{static_cast<float>(row[d * kPair])};
    }
  });
}

}  // namespace longtake
