#include "pipeline/wan_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "build_config.h"
#include "device/cuda_device.h"
#include "kv/page.h"
#include "models/wan/image_encoder.h"
#include "models/wan/text_encoder.h"
#include "models/wan/vae.h"
#include "models/wan/vae_encoder.h"

namespace longtake {
namespace {

// Values that a decoder keeps from frame to frame: two frames before every convolution over time of
// the VAE, per latent and channel of `dim`; one before every block of TAEHV, per latent.
constexpr double kVaeStream = 1576, kTaehvStream = 5376;

// Bytes of a decoder's temporaries per latent, of the VAE also per channel of `dim`, mostly those
// of the last stage at 64 pixels a latent. The workspace grows by doubling: a little is wasted.
double vae_work(double compute_bytes) {
  return 1.5 * (2500 + 600 * compute_bytes);
}

double taehv_work(double compute_bytes) {
  return 4096 * (4 + 6 * compute_bytes);
}

// Matrices are packed in the compute type, with some padding; everything else is f32, and so are
// those that run once per prompt or timestep.
double packed_bytes(const WeightTable& table, DType compute) {
  constexpr double kPadding = 1.03;
  double bytes = 0;
  for (const auto& [name, shape] : table.wanted()) {
    const bool is_small = shape.rank() < 2 || name.starts_with("text_embedding.") ||
                          name.starts_with("time_") || name.ends_with("modulation");
    bytes += static_cast<double>(shape.numel()) *
             static_cast<double>(is_small ? size_of(DType::kF32) : size_of(compute));
  }
  return kPadding * bytes;
}

// Pages of the GPU's caches, whose frames begin in pages of their own, and what lies beside them.
constexpr int64_t kGpuPageTokens = 128;
constexpr double kGpuWork = double{1 << 20} * 512;  // libraries, records, parts of an attention

// Bytes of TempCache's state on top of the pages: of a group, of a key of the frame in work.
struct MergeBytes {
  double group, key;
};

MergeBytes merge_bytes(int64_t head_dim, DType dtype, DeviceKind device) {
  const auto dim = static_cast<double>(head_dim);
  // A group's key and value, and its key as it is compared, in f32, or on the GPU beside pages in
  // bf16 in 24, 24 and 16 bits; on the GPU also codes, counts and sightings.
  if (device == DeviceKind::kCpu) return {3 * sizeof(float) * dim, 0};
  constexpr double kCounts = 140, kFound = 600;
  const bool is_wide = dtype == DType::kF32;
  const double group = is_wide ? 12 : 8, mapped = is_wide ? 4 : 2;
  return {(group + 1) * dim + kCounts, (sizeof(float) + mapped + 1) * dim + kFound};
}

double cache_bytes(const WanOptions& options, const wan::TransformerConfig& config,
                   DeviceKind device) {
  const ModelSizes sizes = model_sizes(options, config);
  const Method method = options.method ? *options.method : own_method(options);
  const CacheOptions cache = cache_options(method, sizes, options.dtype, options.expected_frames);
  const bool on_gpu = device == DeviceKind::kCuda;
  const double slot =
      2 * static_cast<double>(sizes.head_dim * static_cast<int64_t>(size_of(options.dtype))) +
      sizeof(float);
  const auto heads = static_cast<double>(sizes.num_heads * sizes.num_layers);
  const double frame = on_gpu ? heads * slot *
                                    static_cast<double>((sizes.frame_tokens + kGpuPageTokens - 1) /
                                                        kGpuPageTokens * kGpuPageTokens)
                              : cache_bytes_per_frame(sizes, options.dtype);
  const auto own = static_cast<double>(options.chunk_frames);
  const double in_work = options.is_rolling ? own * static_cast<double>(options.steps.size()) : own;
  const auto frames_of = [&](int64_t keys) {
    return static_cast<double>(keys) / static_cast<double>(sizes.frame_tokens);
  };
  if (cache.memory == "window")
    return frame *
           (in_work + static_cast<double>(cache.window_frames + 1 +
                                          cache.sink_frames * (options.moves_sink ? 2 : 1)));
  if (cache.memory == "full")
    return frame * (in_work + static_cast<double>(options.expected_frames));
  const int64_t budget =
      cache.memory == "tempcache" ? cache.tempcache.budget_tokens : cache.budget_tokens;
  const double kept = budget > 0 ? frames_of(budget) : static_cast<double>(options.expected_frames);
  const MergeBytes beside = cache.memory == "tempcache"
                                ? merge_bytes(sizes.head_dim, options.dtype, device)
                                : MergeBytes{};
  return frame * (in_work + 3 + kept) +
         heads * static_cast<double>(sizes.frame_tokens) * (kept * beside.group + beside.key);
}

// Of the action modules: keys and values of every place for the mouse, and of a frame for the
// keyboard.
double action_bytes(const WanOptions& options, const wan::TransformerConfig& config) {
  const wan::ActionConfig& actions = config.actions;
  const int64_t places = (actions.has_mouse ? model_sizes(options, config).frame_tokens : 0) + 1;
  return 2 * static_cast<double>(actions.num_layers * options.context_frames * places *
                                 actions.num_heads * wan::kActionHeadDim *
                                 static_cast<int64_t>(size_of(options.dtype)));
}

// Temporaries of a pass over so many tokens.
double pass_bytes(const wan::TransformerConfig& config, double tokens, DType compute) {
  const auto c = static_cast<double>(size_of(compute));
  constexpr double kF32 = sizeof(float);
  const double streams = static_cast<double>(config.dim) * (3 * kF32 + 6 * c);
  const double hidden = static_cast<double>(config.ffn_dim) * c;
  // Of an action module: features, and what they become three times, in f32.
  const double actions =
      static_cast<double>(config.actions.num_heads * wan::kActionHeadDim) * 8 * kF32;
  return tokens * (streams + std::max(hidden, actions));
}

}  // namespace

WanMemory memory_to_play(const WanOptions& options, const wan::TransformerConfig& config,
                         const Checkpoint& decoder, wan::DecoderKind kind, Device device,
                         int64_t tile) {
  const Checkpoint none;
  WanMemory out;
  {
    WeightTable table(none, nullptr);
    const wan::Transformer transformer(config, DType::kF32, DType::kF32, table);
    out.weights += packed_bytes(table, options.dtype);
  }
  WeightTable table(none, nullptr);
  const wan::TileAxis down = wan::tiles_along(options.height, tile);
  const wan::TileAxis across = wan::tiles_along(options.width, tile);
  const auto latents = static_cast<double>(down.size * across.size);  // of a tile
  const auto tiles = static_cast<double>(down.begins.size() * across.begins.size());
  const auto c = static_cast<double>(size_of(options.dtype));
  double decode = 0;
  if (kind == wan::DecoderKind::kVae) {
    const int64_t dim = wan::vae_dim(decoder);
    const wan::VaeDecoder vae(dim, DType::kF32, table);
    decode = latents * static_cast<double>(dim) * vae_work(c);
    out.stream = tiles * latents * static_cast<double>(dim) * kVaeStream * c;
  } else {
    const wan::TaehvDecoder taehv(DType::kF32, table);
    decode = latents * taehv_work(c);
    out.stream = tiles * latents * kTaehvStream * c;
  }
  out.weights += packed_bytes(table, options.dtype);
  out.cache = cache_bytes(options, config, device.kind) + action_bytes(options, config);
  const auto frame_tokens = static_cast<double>(model_sizes(options, config).frame_tokens);
  const int64_t frames = options.is_rolling
                             ? options.chunk_frames * static_cast<int64_t>(options.steps.size())
                         : options.recaches ? options.context_frames
                                            : options.chunk_frames;
  const double pass = pass_bytes(config, frame_tokens * static_cast<double>(frames), options.dtype);
  // On a GPU a chunk is decoded while the next one is made.
  out.work = device.kind == DeviceKind::kCuda ? decode + pass + kGpuWork : std::max(decode, pass);
  return out;
}

size_t memory_to_encode(const Checkpoint& text_encoder, DType compute) {
  const wan::TextEncoderConfig config = wan::text_encoder_config(text_encoder);
  const Checkpoint none;
  WeightTable table(none, nullptr);
  wan::TextEncoder::list_weights(config, table);
  const double words =
      static_cast<double>(config.vocab_size * config.dim * static_cast<int64_t>(size_of(compute)));
  return static_cast<size_t>(packed_bytes(table, compute) - words);  // the words stay in the file
}

size_t memory_to_encode_image(const Checkpoint& image_encoder, DType compute) {
  const Checkpoint none;
  WeightTable table(none, nullptr);
  const wan::ImageEncoder encoder(wan::image_encoder_config(image_encoder), DType::kF32, table);
  return static_cast<size_t>(packed_bytes(table, compute));
}

void add_picture_encoder(const WanOptions& options, const Checkpoint& vae, WanMemory& memory) {
  const Checkpoint none;
  WeightTable table(none, nullptr);
  const int64_t dim = wan::vae_dim(vae);
  const wan::VaeEncoder encoder(dim, DType::kF32, table);
  const auto c = static_cast<double>(size_of(options.dtype));
  const auto values = static_cast<double>(options.height * options.width * dim);
  // As large as the decoder, which it resembles.
  memory.weights += packed_bytes(table, options.dtype);
  memory.stream += values * kVaeStream * c;
  memory.work = std::max(memory.work, values * vae_work(c));
}

size_t free_memory_bytes(Device device) {
  if constexpr (kHasCuda) {
    if (device.kind == DeviceKind::kCuda) return cuda::free_bytes(device.index);
  }
  std::ifstream info("/proc/meminfo");
  for (std::string key; info >> key;) {
    size_t kib = 0;
    if (key == "MemAvailable:" && info >> kib) return kib * 1024;
    info.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::numeric_limits<size_t>::max();
}

}  // namespace longtake
