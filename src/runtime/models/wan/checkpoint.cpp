#include "models/wan/checkpoint.h"

#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "io/json.h"

namespace longtake::wan {
namespace {

using Names = std::pair<std::string_view, std::string_view>;

// Left by FSDP, activation checkpointing and torch.compile anywhere in a name.
constexpr std::string_view kWrappers[] = {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
                                          "_orig_mod."};

// Diffusers' names of the top level, by their beginning.
constexpr Names kTopNames[] = {{"condition_embedder.text_embedder.linear_1.", "text_embedding.0."},
                               {"condition_embedder.text_embedder.linear_2.", "text_embedding.2."},
                               {"condition_embedder.time_embedder.linear_1.", "time_embedding.0."},
                               {"condition_embedder.time_embedder.linear_2.", "time_embedding.2."},
                               {"condition_embedder.time_proj.", "time_projection.1."},
                               {"proj_out.", "head.head."}};

// Diffusers' names within a block, by their beginning.
constexpr Names kBlockNames[] = {{"attn1.to_q.", "self_attn.q."},
                                 {"attn1.to_k.", "self_attn.k."},
                                 {"attn1.to_v.", "self_attn.v."},
                                 {"attn1.to_out.0.", "self_attn.o."},
                                 {"attn1.", "self_attn."},
                                 {"attn2.to_q.", "cross_attn.q."},
                                 {"attn2.to_k.", "cross_attn.k."},
                                 {"attn2.to_v.", "cross_attn.v."},
                                 {"attn2.to_out.0.", "cross_attn.o."},
                                 {"attn2.", "cross_attn."},
                                 {"ffn.net.0.proj.", "ffn.0."},
                                 {"ffn.net.2.", "ffn.2."},
                                 {"norm2.", "norm3."}};

// Replaces the first of `names` that `text` begins with.
template <size_t N>
std::string with_beginning(std::string text, const Names (&names)[N]) {
  for (const auto& [from, to] : names) {
    if (text.starts_with(from)) return str(to, text.substr(from.size()));
  }
  return text;
}

// The file's tensors under the first key of `order` that is there; `what` they are, for errors.
Checkpoint open_group(const std::string& path, const std::vector<std::string>& order,
                      const char* what) {
  Checkpoint file(path);
  const auto groups = file.groups();
  for (const std::string& wanted : order) {
    if (groups.count(wanted) == 0) continue;
    file.keep_group(wanted);
    return file;
  }
  std::string found;
  for (const std::string& other : groups) found += (found.empty() ? "" : ", ") + printable(other);
  throw Error(ErrorKind::kInput, str(path, ": expected ", what, ", found ",
                                     found.empty() ? "no tensors" : "tensors under " + found));
}

}  // namespace

std::string original_name(std::string name) {
  for (const std::string_view wrapper : kWrappers) {
    for (size_t at = name.find(wrapper); at != std::string::npos; at = name.find(wrapper, at))
      name.erase(at, wrapper.size());
  }
  constexpr std::string_view kModel = "model.";
  if (name.starts_with(kModel)) name.erase(0, kModel.size());
  if (name == "scale_shift_table") return "head.modulation";
  constexpr std::string_view kBlocks = "blocks.";
  if (!name.starts_with(kBlocks)) return with_beginning(std::move(name), kTopNames);
  const size_t part = name.find('.', kBlocks.size()) + 1;
  const std::string inner = name.substr(part);
  return name.substr(0, part) +
         (inner == "scale_shift_table" ? "modulation" : with_beginning(inner, kBlockNames));
}

Checkpoint open_generator(const std::string& path, const std::string& group) {
  std::vector<std::string> order = {"generator_ema", "generator", "model", ""};
  if (!group.empty()) order.insert(order.begin(), group);
  Checkpoint file =
      open_group(path, order, "weights under generator_ema, generator, model or at the top");
  file.rename(original_name);
  return file;
}

Checkpoint open_lora(const std::string& path) {
  return open_group(path, {"generator_lora", ""}, "updates under generator_lora or at the top");
}

}  // namespace longtake::wan
