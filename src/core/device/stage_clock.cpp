#include "device/stage_clock.h"

#include "build_config.h"

namespace longtake {

StageClock::StageClock(Context& ctx, int num_marks) : host_(static_cast<size_t>(num_marks)) {
  if constexpr (kHasCuda) {
    if (ctx.cuda() != nullptr) events_ = std::make_shared<cuda::Events>(*ctx.cuda(), num_marks);
  }
}

void StageClock::mark(int index) {
  if constexpr (kHasCuda) {
    if (events_ != nullptr) {
      events_->record(index);
      return;
    }
  }
  host_[static_cast<size_t>(index)] = std::chrono::steady_clock::now();
}

double StageClock::ms(int begin, int end) const {
  if constexpr (kHasCuda) {
    if (events_ != nullptr) return events_->ms(begin, end);
  }
  return std::chrono::duration<double, std::milli>(host_[static_cast<size_t>(end)] -
                                                   host_[static_cast<size_t>(begin)])
      .count();
}

}  // namespace longtake
