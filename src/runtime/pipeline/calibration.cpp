#include "pipeline/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "metrics/attention.h"
#include "metrics/image.h"
#include "ops/image.h"
#include "pipeline/rollout.h"

namespace longtake {
namespace {

constexpr const char* kKind = "longtake-calibration";
constexpr int64_t kVersion = 1;
constexpr JsonLimits kLimits{1 << 20, 8};
constexpr int64_t kMostSteps = 1000;

// All indices below `count`.
std::vector<int64_t> all(int64_t count) {
  std::vector<int64_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

std::vector<int64_t> all_but(int64_t count, int64_t one) {
  std::vector<int64_t> out = all(count);
  out.erase(out.begin() + one);
  return out;
}

// Recall of every head at every sampling step of a pass.
class RecallObserver final : public PassObserver {
 public:
  RecallObserver(const Rollout& rollout, int64_t stride, size_t num_layers)
      : rollout_(rollout), stride_(stride), scores_(num_layers) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    if (rollout_.step() == rollout_.frame_steps()) return;
    const auto scale = 1.0F / std::sqrt(static_cast<float>(read.kv.head_dim));
    const auto found = score_heads(read.q, read.kv, read.kv, read.selection, {}, scale, stride_);
    auto& sums = scores_[static_cast<size_t>(layer)];
    sums.resize(found.size());
    for (size_t head = 0; head < found.size(); ++head) sums[head].add(found[head]);
  }

  const std::vector<std::vector<AttentionScore>>& scores() const { return scores_; }

 private:
  const Rollout& rollout_;
  int64_t stride_;
  std::vector<std::vector<AttentionScore>> scores_;  // [layers][heads]
};

// By how much the noise level's embedding and the layers' output changed from step to step.
class ChangeMeter final : public world::LayerReuse {
 public:
  ChangeMeter(Context& ctx, const Shape& stream) : residual_(ctx.device(), DType::kF32, stream) {}

  void begin_frame() { has_time_ = has_output_ = false; }

  // Every step runs; the output of the one before lies in residual() until it does.
  bool must_run(Context& /*ctx*/, View time, View /*x*/) override {
    take_output();
    if (has_time_)
      embedding_.push_back(relative_change(time.data<float>(), time_.data(), time.numel()));
    time_.assign(time.data<float>(), time.data<float>() + time.numel());
    has_time_ = true;
    return true;
  }

  View residual() override { return residual_; }

  void end_frame() { take_output(); }

  const std::vector<double>& embedding() const { return embedding_; }

  const std::vector<double>& output() const { return output_; }

 private:
  void take_output() {
    if (!has_time_) return;
    const auto* now = residual_.data<float>();
    if (has_output_) output_.push_back(relative_change(now, before_.data(), residual_.numel()));
    before_.assign(now, now + residual_.numel());
    has_output_ = true;
  }

  Tensor residual_;
  std::vector<float> time_, before_;
  std::vector<double> embedding_, output_;  // changes, step by step
  bool has_time_ = false, has_output_ = false;
};

std::vector<CalibratedPart> judge(const std::vector<double>& errors) {
  std::vector<CalibratedPart> parts;
  for (const double error : errors) parts.push_back({error, false});
  for (const int64_t dense : dense_parts(errors)) parts[static_cast<size_t>(dense)].dense = true;
  return parts;
}

class Calibrator {
 public:
  Calibrator(Context& ctx, const world::Model& model, const CalibrationOptions& options,
             const std::function<bool()>& stopped,
             const std::function<void(const std::string&)>& progress)
      : ctx_(ctx),
        model_(model),
        options_(options),
        stopped_(stopped),
        progress_(progress),
        num_layers_(model.config.transformer.num_layers),
        changes_(ctx, {model.config.transformer.frame_tokens(), model.config.transformer.dim}) {
    method_.num_steps = options.method.num_steps;
    method_.sparse_self = true;
    method_.select = options.method.select;
    method_.set("ann", options.method.get("ann"));
    dense_ = method_;
    dense_.dense_layers = all(num_layers_);
    scores_.resize(static_cast<size_t>(num_layers_));
    layers_.resize(static_cast<size_t>(num_layers_));
    groups_.resize(static_cast<size_t>(num_layers_));
    merging_.set("memory", "tempcache");
    merging_.set("ann", options.method.get("ann"));
  }

  void play(const Scenario& scenario) {
    const auto& sizes = model_.config.transformer;
    const Tensor text =
        model_.text_encoder.encode(ctx_, model_.vocabulary.tokenize(scenario.prompt));
    Rollout rollout(ctx_, model_, text, dense_, scenario.num_frames());
    Rollout merged(ctx_, model_, text, merging_, scenario.num_frames());
    steps_.resize(static_cast<size_t>(rollout.num_steps()));
    const Shape latent{sizes.latent_channels, sizes.latent_height, sizes.latent_width};
    const Tensor z(ctx_.device(), DType::kF32, latent);
    const Tensor rgb(ctx_.device(), DType::kU8, {sizes.frame_height(), sizes.frame_width(), 3});
    const Tensor pixels(ctx_.device(), DType::kF32, rgb.shape());
    for (int64_t frame = 0; frame < scenario.num_frames(); ++frame) {
      if (stopped_()) throw Error("calibrate: expected to finish, found a request to stop");
      if (frame % 16 == 0)
        progress_(str(scenario.name, ": frame ", frame, " of ", scenario.num_frames()));
      const CameraPosition camera = scenario.cameras[static_cast<size_t>(frame)];
      rollout.begin_frame(ctx_, frame, camera.x, camera.y);
      if (frame < scenario.num_primed) {
        scenario.render_truth(frame, {rgb.data<uint8_t>(), rgb.bytes()});
        from_rgb(ctx_, rgb, pixels);
        model_.autoencoder.encode(ctx_, pixels, z);
      } else {
        rollout.denoise(ctx_, scenario.seed, z);
        if (frame > scenario.num_primed &&
            (frame - scenario.num_primed) % options_.probe_every == 0)
          probe(rollout, scenario.seed, z);
      }
      rollout.remember(ctx_, z);
      merged.begin_frame(ctx_, frame, camera.x, camera.y);
      merged.remember(ctx_, z);
    }
    const CacheOptions& memory = merging_.memory;
    const int64_t apart = (memory.sink_frames + memory.tempcache.exact_frames) *
                          sizes.frame_tokens();  // keys that do not merge
    for (size_t n = 0; n < groups_.size(); ++n) {
      const auto keys = static_cast<double>(merged.layers()[n].memory.cache->total_entries());
      groups_[n] += keys / static_cast<double>(sizes.num_heads) - static_cast<double>(apart);
    }
    ++num_maps_;
  }

  Calibration result() const {
    Calibration out;
    out.model_fingerprint = world::model_fingerprint(model_.folder);
    out.method = method_.to_string();
    out.num_probes = num_probes_;
    out.steps = judge(errors(steps_));
    out.layers = judge(errors(layers_));
    for (const auto& layer : scores_) {
      auto& heads = out.heads.emplace_back();
      for (const AttentionScore& head : layer)
        heads.push_back({head.mean().recall, head.mean().oracle});
    }
    for (const double groups : groups_)
      out.tempcache_groups.push_back(groups / static_cast<double>(num_maps_));
    constexpr int64_t kDegree = 4;  // as TeaCache's
    out.teacache_polynomial = fit_polynomial(changes_.embedding(), changes_.output(), kDegree);
    return out;
  }

 private:
  // The frame in work made in several numbers of steps: how its steps change.
  void measure_changes(Rollout& rollout, uint64_t seed, View own) {
    const int64_t usual = rollout.num_steps();
    for (const int64_t steps : {usual, 2 * usual, 4 * usual}) {
      rollout.measure_steps(ctx_, steps, &changes_);
      changes_.begin_frame();
      rollout.denoise(ctx_, seed, own);
      changes_.end_frame();
    }
    rollout.measure_steps(ctx_, usual, nullptr);
  }

  // z: the frame that the dense rollout made.
  void probe(Rollout& rollout, uint64_t seed, View z) {
    const std::vector<float> expected(z.data<float>(), z.data<float>() + z.numel());
    const Tensor own(ctx_.device(), DType::kF32, z.shape());
    const auto square_error = [&](std::vector<int64_t> dense_steps,
                                  std::vector<int64_t> dense_layers, RecallObserver* observer) {
      Method method = method_;
      method.dense_steps = std::move(dense_steps);
      method.dense_layers = std::move(dense_layers);
      rollout.set_selection(ctx_, method);
      rollout.denoise(ctx_, seed, own, observer);
      const double error =
          relative_l2({own.data<float>(), static_cast<size_t>(own.numel())}, expected);
      return error * error;
    };
    for (int64_t step = 0; step < rollout.num_steps(); ++step)
      steps_[static_cast<size_t>(step)] +=
          square_error(all_but(rollout.num_steps(), step), {}, nullptr);
    // A step that stays dense hides what it would cost in a layer.
    const std::vector<int64_t> dense_steps = dense_parts(errors(steps_));
    for (int64_t layer = 0; layer < num_layers_; ++layer)
      layers_[static_cast<size_t>(layer)] +=
          square_error(dense_steps, all_but(num_layers_, layer), nullptr);
    RecallObserver observer(rollout, options_.query_stride, scores_.size());
    square_error({}, {}, &observer);
    for (size_t layer = 0; layer < scores_.size(); ++layer) {
      const auto& heads = observer.scores()[layer];
      scores_[layer].resize(heads.size());
      for (size_t head = 0; head < heads.size(); ++head) scores_[layer][head].add(heads[head]);
    }
    rollout.set_selection(ctx_, dense_);
    measure_changes(rollout, seed, own);
    ++num_probes_;
  }

  // From sums of squared errors.
  std::vector<double> errors(const std::vector<double>& sums) const {
    std::vector<double> out;
    for (const double sum : sums)
      out.push_back(std::sqrt(sum / static_cast<double>(std::max<int64_t>(1, num_probes_))));
    return out;
  }

  Context& ctx_;
  const world::Model& model_;
  const CalibrationOptions& options_;
  const std::function<bool()>& stopped_;
  const std::function<void(const std::string&)>& progress_;
  int64_t num_layers_;
  Method method_, dense_;  // dense_ keeps for method_ what it needs to know of the history
  std::vector<double> steps_, layers_;               // sums of squared errors
  std::vector<std::vector<AttentionScore>> scores_;  // [layers][heads]
  int64_t num_probes_ = 0;
  Method merging_;
  std::vector<double> groups_;  // [layers]: sums over maps
  int64_t num_maps_ = 0;
  ChangeMeter changes_;
};

std::string hex(uint64_t value) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(value));
  return digits;
}

std::vector<int64_t> dense_indices(const std::vector<CalibratedPart>& parts) {
  std::vector<int64_t> out;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].dense) out.push_back(static_cast<int64_t>(i));
  }
  return out;
}

// What is read by people needs no more digits.
double rounded(double value) {
  return std::round(1e6 * value) / 1e6;
}

CalibratedPart read_part(const JsonObject& json) {
  return {json.number("error", 0, 1e9), json.boolean("dense")};
}

}  // namespace

std::string Calibration::to_json() const {
  using nlohmann::ordered_json;
  ordered_json root = {{"kind", kKind},
                       {"version", kVersion},
                       {"model_fingerprint", hex(model_fingerprint)},
                       {"method", method},
                       {"probes", num_probes},
                       {"num_steps", steps.size()},
                       {"steps", ordered_json::array()},
                       {"layers", ordered_json::array()}};
  for (const CalibratedPart& step : steps)
    root["steps"].push_back({{"error", rounded(step.error)}, {"dense", step.dense}});
  for (size_t i = 0; i < layers.size(); ++i) {
    ordered_json layer = {{"error", rounded(layers[i].error)},
                          {"dense", layers[i].dense},
                          {"heads", ordered_json::array()}};
    for (const CalibratedHead& head : heads[i])
      layer["heads"].push_back(
          {{"recall", rounded(head.recall)}, {"oracle", rounded(head.oracle)}});
    root["layers"].push_back(layer);
  }
  // Optional ones: earlier files have none.
  for (const double groups : tempcache_groups) root["tempcache_groups"].push_back(rounded(groups));
  for (const double c : teacache_polynomial) root["teacache_polynomial"].push_back(rounded(c));
  return root.dump(2) + "\n";
}

std::vector<int64_t> dense_parts(const std::vector<double>& errors) {
  constexpr double kStandsOut = 2;  // medians
  std::vector<int64_t> order = all(static_cast<int64_t>(errors.size()));
  const auto error = [&](int64_t i) { return errors[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return error(a) > error(b); });
  const double median = order.empty() ? 0 : error(order[order.size() / 2]);
  order.resize(static_cast<size_t>(dense_count(static_cast<int64_t>(order.size()))));
  std::erase_if(order, [&](int64_t i) { return error(i) <= kStandsOut * median; });
  std::sort(order.begin(), order.end());
  return order;
}

Calibration calibrate(Context& ctx, const world::Model& model,
                      const std::vector<Scenario>& scenarios, const CalibrationOptions& options,
                      const std::function<bool()>& stopped,
                      const std::function<void(const std::string& what)>& progress) {
  LONGTAKE_CHECK(options.method.sparse_self);
  Calibrator calibrator(ctx, model, options, stopped, progress);
  for (const Scenario& scenario : scenarios) calibrator.play(scenario);
  return calibrator.result();
}

Calibration parse_calibration(std::span<const std::byte> text, const std::string& what,
                              const world::TransformerConfig& sizes, uint64_t model_fingerprint) {
  const nlohmann::json json = parse_json(text, what, kLimits);
  const JsonObject root(json, what);
  if (root.string("kind") != kKind)
    throw Error(ErrorKind::kInput, str(what, ": kind: expected \"", kKind, "\", found \"",
                                       printable(root.string("kind")), '"'));
  root.integer("version", kVersion, kVersion);
  const std::string found = root.string("model_fingerprint");
  if (found != hex(model_fingerprint))
    throw Error(ErrorKind::kInput,
                str(what,
                    ": expected a calibration of these weights (longtake calibrate makes it), "
                    "found one of model ",
                    printable(found)));
  Calibration out;
  out.model_fingerprint = model_fingerprint;
  try {
    out.method = parse_method(root.string("method")).to_string();
  } catch (const Error& error) {
    throw Error(ErrorKind::kInput, str(what, ": method: ", error.what()));
  }
  out.num_probes = root.integer("probes", 1, INT32_MAX);
  const auto num_steps = static_cast<size_t>(root.integer("num_steps", 1, kMostSteps));
  for (const JsonObject& step : root.objects("steps", num_steps))
    out.steps.push_back(read_part(step));
  for (const JsonObject& layer : root.objects("layers", static_cast<size_t>(sizes.num_layers))) {
    out.layers.push_back(read_part(layer));
    auto& heads = out.heads.emplace_back();
    for (const JsonObject& head : layer.objects("heads", static_cast<size_t>(sizes.num_heads)))
      heads.push_back({head.number("recall", 0, 1 + 1e-6), head.number("oracle", 0, 1 + 1e-6)});
  }
  const auto layers = static_cast<size_t>(sizes.num_layers);
  constexpr double kMostGroups = 1e9, kMostCoefficient = 1e9;
  if (root.has("tempcache_groups")) {
    out.tempcache_groups = root.numbers("tempcache_groups", layers, 0, kMostGroups);
    if (out.tempcache_groups.size() != layers)
      throw Error(ErrorKind::kInput, str(what, ": tempcache_groups: expected ", layers,
                                         " numbers, found ", out.tempcache_groups.size()));
  }
  if (root.has("teacache_polynomial"))
    out.teacache_polynomial =
        root.numbers("teacache_polynomial", kMostSteps, -kMostCoefficient, kMostCoefficient);
  return out;
}

Calibration read_calibration(const std::string& path, const world::TransformerConfig& sizes,
                             uint64_t model_fingerprint) {
  return parse_calibration(MappedFile(path).bytes(), path, sizes, model_fingerprint);
}

void apply(const Calibration& calibration, int64_t num_steps, Method& method) {
  const int64_t steps = method.num_steps > 0 ? method.num_steps : num_steps;
  if (!method.dense_layers) method.dense_layers = dense_indices(calibration.layers);
  if (!method.dense_steps && steps == static_cast<int64_t>(calibration.steps.size()))
    method.dense_steps = dense_indices(calibration.steps);
  if (!method.layer_shares) {
    constexpr double kLeastGroups = 1;  // a layer without any gets a share, too
    method.layer_shares.emplace();
    for (const double groups : calibration.tempcache_groups)
      method.layer_shares->push_back(std::max(groups, kLeastGroups));
  }
  if (!method.step_cache.polynomial) method.step_cache.polynomial = calibration.teacache_polynomial;
}

}  // namespace longtake
