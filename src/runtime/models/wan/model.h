// A transformer of the Wan family from its files: weights, and LongLive's update of them.
#pragma once

#include <cstddef>
#include <memory>

#include "device/context.h"
#include "models/wan/model_files.h"
#include "models/wan/transformer.h"

namespace longtake::wan {

// What the files say without loading them. Throws Error (kInput) when they are no transformer, or
// one that lacks something: everything that is wrong shows here.
TransformerConfig read_config(const ModelFiles& files);

// compute and residual: as Transformer takes them; bytes, if not null, receives what the weights
// take. Throws Error (kInput).
std::unique_ptr<Transformer> load_transformer(Context& ctx, const ModelFiles& files, DType compute,
                                              DType residual, size_t* bytes = nullptr);

}  // namespace longtake::wan
