#include "models/wan/model.h"

#include <optional>

#include "base/error.h"
#include "models/wan/checkpoint.h"

namespace longtake::wan {
namespace {

constexpr float kLoraScale = 1;  // alpha / rank of LongLive, which the file does not hold

}  // namespace

TransformerConfig read_config(const ModelFiles& files) {
  const Checkpoint file = open_generator(files.transformer, files.group);
  const TransformerConfig config = transformer_config(file);
  WeightTable table(file, nullptr);
  const Transformer transformer(config, DType::kF32, DType::kF32, table);
  table.finish();
  return config;
}

std::unique_ptr<Transformer> load_transformer(Context& ctx, const ModelFiles& files, DType compute,
                                              DType residual, size_t* bytes) {
  const Checkpoint file = open_generator(files.transformer, files.group);
  std::optional<Checkpoint> lora;
  if (!files.lora.empty()) lora.emplace(open_lora(files.lora));
  WeightTable table(file, &ctx);
  if (lora) table.merge_lora(*lora, kLoraScale);
  auto out = std::make_unique<Transformer>(transformer_config(file), compute, residual, table);
  table.finish();
  if (bytes != nullptr) *bytes = table.bytes();
  return out;
}

}  // namespace longtake::wan
