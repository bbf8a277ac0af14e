// Model folders of the true layout and sizes with random weights: anyone can measure speed and
// memory without a licence or a download. They say nothing about quality. The tokenizer knows
// letters only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "device/context.h"

namespace longtake::wan {

struct RandomModelOptions {
  // "1.3b", "14b", "matrix-game-2"; or, for tests, "tiny" and "matrix-game-2-tiny": two layers
  std::string size = "1.3b";
  DType dtype = DType::kBF16;            // of the files: f32 | bf16
  bool transformer_only = false;         // no encoders, no decoders
  bool text_encoder = true;              // by far the largest file
  size_t shard_bytes = size_t{5} << 30;  // of the transformer's files, as hubs like them
  uint64_t seed = 0;
};

// Writes into `folder`, which is made if it is not there; the names are those of ModelFiles. Throws
// Error (kUsage) for another size or type, Error (kRuntime) when the disk is full.
void write_random_model(Context& ctx, const std::string& folder, const RandomModelOptions& options);

}  // namespace longtake::wan
