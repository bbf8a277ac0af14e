#include "models/wan/prompt.h"

#include <algorithm>

#include "base/error.h"
#include "io/checkpoint.h"
#include "io/safetensors.h"
#include "io/tokenizer.h"
#include "models/wan/text_encoder.h"

namespace longtake::wan {
namespace {

constexpr const char* kEmbeddings = "prompt_embeds";
constexpr const char* kWords = "prompt";

}  // namespace

std::vector<Tensor> encode_prompts(Context& ctx, const ModelFiles& files,
                                   std::span<const std::string> prompts, DType compute) {
  const Tokenizer tokenizer(files.tokenizer);
  const TextEncoder encoder(ctx, Checkpoint(files.text_encoder), compute);
  if (tokenizer.vocab_size() > encoder.config().vocab_size)
    throw Error(ErrorKind::kInput,
                str(files.tokenizer, ": expected at most ", encoder.config().vocab_size,
                    " words, as the text encoder has, found ", tokenizer.vocab_size()));
  std::vector<Tensor> out;
  for (const std::string& prompt : prompts)
    out.push_back(
        encoder.encode_padded(ctx, tokenizer.encode(clean_prompt(prompt), kTextLen), kTextLen));
  return out;
}

void save_prompt(const std::string& path, const SavedPrompt& prompt) {
  const View all = prompt.embeddings;
  const int64_t dim = all.dim(1);
  const auto is_zero = [&](int64_t row) {
    const float* values = all.data<float>() + row * dim;
    return std::all_of(values, values + dim, [](float x) { return x == 0; });
  };
  int64_t tokens = all.dim(0);
  while (tokens > 1 && is_zero(tokens - 1)) --tokens;
  const NamedView named{kEmbeddings, all.rows(0, tokens)};
  write_safetensors(path, std::span(&named, 1), {{kWords, prompt.text}});
}

SavedPrompt load_prompt(const std::string& path, int64_t text_dim) {
  const Checkpoint file(path);
  const StoredTensor* stored = file.find(kEmbeddings);
  if (stored == nullptr || stored->shape.rank() != 2 || stored->shape[0] < 1 ||
      stored->shape[0] > kTextLen || stored->shape[1] != text_dim)
    throw Error(ErrorKind::kInput,
                str(path, ": expected ", kEmbeddings, " of 1..", kTextLen, " x ", text_dim,
                    ", found ", stored != nullptr ? stored->shape.to_string() : "no such tensor"));
  SavedPrompt out;
  const auto words = file.metadata().find(kWords);
  if (words != file.metadata().end()) out.text = words->second;
  out.embeddings = Tensor::zeros(Device{}, DType::kF32, {kTextLen, text_dim});
  read_tensor(*stored, out.embeddings.view().rows(0, stored->shape[0]));
  return out;
}

}  // namespace longtake::wan
