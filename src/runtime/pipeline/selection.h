// What a method selects by, given to the layers of a rollout: AnnSA's pages, AnnCA's tokens.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "nn/dit_layer.h"
#include "pipeline/method.h"

namespace longtake {

// From here on the layers select as `method` says, whose dense parts are named; histories and
// prompts stay as they are.
void set_selection(Context& ctx, const Method& method, const ModelSizes& sizes,
                   std::span<LayerState> layers);

// Whether sampling step `step` reads only what is selected; the clean pass, behind the last step,
// reads everything.
bool is_sparse_step(const Method& method, int64_t step);

}  // namespace longtake
