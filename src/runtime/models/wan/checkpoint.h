// Checkpoints of the Wan family as their makers ship them: which of a file's state dicts to take,
// and from which wrappers to free its names.
#pragma once

#include <string>

#include "io/checkpoint.h"

namespace longtake::wan {

// The weights of a generator under the names of the original Wan code ("blocks.0.ffn.0.weight").
// group: the top-level key to take, e.g. "generator" or "generator_ema"; if the file lacks it (or
// with ""), the first of generator_ema, generator, model and the file itself that is there. Names
// lose the marks of distributed training and one leading "model."; those of Diffusers are
// translated. Throws Error (kInput).
Checkpoint open_generator(const std::string& path, const std::string& group = "");

// The low-rank updates of a generator, which WeightTable::merge_lora takes: those under
// generator_lora, or those of the file itself. Throws Error (kInput).
Checkpoint open_lora(const std::string& path);

// The name in the original code of a tensor that any of the known exporters named.
std::string original_name(std::string name);

}  // namespace longtake::wan
