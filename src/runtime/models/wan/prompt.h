// Prompts of the Wan family: from words to what the transformer reads, once; and as files, so that
// the large text encoder need not be there.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "device/context.h"
#include "models/wan/model_files.h"
#include "tensor/tensor.h"

namespace longtake::wan {

inline constexpr int64_t kTextLen = 512;  // tokens that a transformer reads, padding included

// Cleans, cuts into tokens, encodes: [kTextLen, text_dim] f32 of each, rows of zeros behind the
// last token. The encoder is loaded for the call and freed. A prompt of more tokens is cut, and a
// warning logged that says where. compute: f32 | bf16. Throws Error (kInput) when the folder has no
// encoder or tokenizer, or theirs differ.
std::vector<Tensor> encode_prompts(Context& ctx, const ModelFiles& files,
                                   std::span<const std::string> prompts, DType compute);

// A prompt's file: safetensors with "prompt_embeds" [tokens, text_dim] f32 and the words as
// metadata "prompt".
struct SavedPrompt {
  std::string text;
  Tensor embeddings;  // [kTextLen, text_dim] f32
};

void save_prompt(const std::string& path, const SavedPrompt& prompt);

// Throws Error (kInput) for another kind of file, or embeddings of another width.
SavedPrompt load_prompt(const std::string& path, int64_t text_dim);

}  // namespace longtake::wan
