// patchify on the CPU: a latent frame is small, so one plain loop on one thread serves.
#include "device/dispatch.h"
#include "ops/patchify.h"

namespace longtake::cpu {
namespace {

// Calls move(element of z, element of tokens) for every element of z [C, H, W].
template <typename Move>
void for_elements(const Shape& z, int64_t patch, const Move& move) {
  const int64_t columns = z[2] / patch;
  int64_t element = 0;
  for (int64_t c = 0; c < z[0]; ++c) {
    for (int64_t y = 0; y < z[1]; ++y) {
      for (int64_t x = 0; x < z[2]; ++x, ++element) {
        const int64_t token = (y / patch) * columns + x / patch;
        const int64_t value = (c * patch + y % patch) * patch + x % patch;
        move(element, token * z[0] * patch * patch + value);
      }
    }
  }
}

}  // namespace

void patchify(Context&, View z, int64_t patch, View out) {
  for_float_type(out.dtype(), [&]<typename Out>() {
    const float* from = z.data<float>();
    Out* to = out.data<Out>();
    for_elements(z.shape(), patch,
                 [=](int64_t i, int64_t token) { to[token] = static_cast<Out>(from[i]); });
  });
}

void unpatchify(Context&, View x, int64_t patch, View z) {
  const float* from = x.data<float>();
  float* to = z.data<float>();
  for_elements(z.shape(), patch, [=](int64_t i, int64_t token) { to[i] = from[token]; });
}

}  // namespace longtake::cpu
