#include "device/branch.h"

#include "build_config.h"

namespace longtake {

void join_branch(Context& ctx) {
  if constexpr (kHasCuda) {
    if (ctx.cuda() != nullptr) cuda::join_branch(*ctx.cuda());
  }
}

void follow(Context& ctx, Context& ahead) {
  if constexpr (kHasCuda) {
    if (ctx.cuda() != ahead.cuda()) cuda::follow(*ctx.cuda(), *ahead.cuda());
  }
}

}  // namespace longtake
