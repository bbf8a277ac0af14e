// What merging costs while a video plays: for a sample of a chunk's queries the bound of what all
// merging so far can have cost, and the measured cost of the chunk's own commit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/context.h"
#include "nn/dit_layer.h"
#include "pipeline/stats.h"

namespace longtake {

// Give it to the clean pass of a chunk, then ask for the errors.
class ErrorWatch final : public PassObserver {
 public:
  explicit ErrorWatch(int64_t num_layers) : samples_(static_cast<size_t>(num_layers)) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override;

  // After the commit of the chunk whose first frame is `frame`, one entry a layer.
  std::vector<LayerError> errors(Context& ctx, std::span<const LayerState> layers,
                                 int64_t frame) const;

 private:
  struct Sample {
    Tensor queries, mixed;  // [S, N, D] in the compute dtype: rows of the clean pass
  };

  std::vector<Sample> samples_;
};

}  // namespace longtake
