#include "pipeline/method.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <set>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

constexpr int64_t kMostFrames = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostSteps = 1000;
constexpr int64_t kMostListed = 1000;
constexpr double kMostNats = 1e6;
constexpr double kMostBudget = 1e15;
constexpr double kLeastShare = 1e-6, kMostShare = 1e6;
constexpr double kMostCoefficient = 1e9;

[[noreturn]] void usage(const std::string& message) {
  throw Error(ErrorKind::kUsage, message);
}

// The fewest digits that read back as the same number.
std::string shortest(double value) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

template <typename T>
T number(const std::string& text, T min, T max) {
  T value{};
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  if (result.ec != std::errc() || result.ptr != end || !(value >= min) || !(value <= max))
    usage(str("expected a number in ", min, "..", max, ", found \"", printable(text), '"'));
  return value;
}

template <typename T>
using Names = std::initializer_list<std::pair<const char*, T>>;

template <typename T>
T choice(const std::string& text, Names<T> names) {
  std::string expected;
  for (const auto& [name, value] : names) {
    if (text == name) return value;
    expected += str(expected.empty() ? "" : " or ", name);
  }
  usage(str("expected ", expected, ", found \"", printable(text), '"'));
}

template <typename T>
std::string name_in(T value, Names<T> names) {
  for (const auto& [name, named] : names) {
    if (value == named) return name;
  }
  return {};
}

const Names<std::string> kMemories = {
    {"full", "full"}, {"window", "window"}, {"tempcache", "tempcache"}, {"flowcache", "flowcache"}};
const Names<AnnEngine> kEngines = {{"lsh", AnnEngine::kLsh}, {"quant", AnnEngine::kQuant}};
const Names<bool> kSelf = {{"dense", false}, {"annsa", true}};
const Names<bool> kCross = {{"dense", false}, {"annca", true}};
const Names<PromptRule> kPromptRules = {{"match", PromptRule::kMatch}, {"mass", PromptRule::kMass}};
const Names<StepReuse> kStepCaches = {{"none", StepReuse::kNone},
                                      {"teacache", StepReuse::kTeaCache},
                                      {"flowcache", StepReuse::kFlowCache}};
const Names<SelectBuckets> kBuckets = {{"shared", SelectBuckets::kShared},
                                       {"prompt", SelectBuckets::kPrompt}};
const Names<MergeRule> kRules = {{"nats", MergeRule::kNats}, {"paper", MergeRule::kPaper}};
const Names<BudgetShares> kShares = {{"even", BudgetShares::kEven}, {"need", BudgetShares::kNeed}};
const Names<GroupKey> kKeys = {{"mean", GroupKey::kMean}, {"newest", GroupKey::kNewest}};
const Names<GroupBias> kBiases = {
    {"none", GroupBias::kNone}, {"logcount", GroupBias::kLogCount}, {"ages", GroupBias::kAges}};

const std::pair<const char*, double> kUnits[] = {{"", 1},         {"B", 1},       {"kB", 1e3},
                                                 {"MB", 1e6},     {"GB", 1e9},    {"KiB", 0x1p10},
                                                 {"MiB", 0x1p20}, {"GiB", 0x1p30}};

MemoryBudget parse_budget(const std::string& text) {
  double amount = 0;
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, amount);
  for (const auto& [unit, factor] : kUnits) {
    if (result.ec == std::errc() && std::string(result.ptr, end) == unit && amount >= 1 &&
        amount * factor <= kMostBudget)
      return {amount * factor, *unit != '\0'};
  }
  usage(str("expected keys (4736) or bytes (64MiB), found \"", printable(text), '"'));
}

std::vector<std::string> split(const std::string& text, const std::string& by) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(by, begin)) != std::string::npos; begin = end + by.size())
    parts.push_back(text.substr(begin, end - begin));
  parts.push_back(text.substr(begin));
  return parts;
}

// "auto", "none" or indices such as "0+1+4", which are sorted.
std::optional<std::vector<int64_t>> parse_list(const std::string& text) {
  if (text == "auto") return std::nullopt;
  std::set<int64_t> indices;
  if (text != "none") {
    for (const std::string& part : split(text, "+"))
      indices.insert(number<int64_t>(part, 0, kMostListed));
  }
  return std::vector<int64_t>(indices.begin(), indices.end());
}

std::string list_text(const std::optional<std::vector<int64_t>>& list) {
  if (!list) return "auto";
  std::string text;
  for (const int64_t index : *list) text += str(text.empty() ? "" : "+", index);
  return text.empty() ? "none" : text;
}

// "auto", `none` or numbers such as "0.5/1.5".
std::optional<std::vector<double>> parse_numbers(const std::string& text, const std::string& none,
                                                 double min, double max) {
  if (text == "auto") return std::nullopt;
  std::vector<double> out;
  if (text == none) return out;
  try {
    for (const std::string& part : split(text, "/")) out.push_back(number<double>(part, min, max));
  } catch (const Error&) {
    usage(str("expected auto, ", none, " or numbers in ", shortest(min), "..", shortest(max),
              " such as 0.5/1.5, found \"", printable(text), '"'));
  }
  return out;
}

std::string numbers_text(const std::optional<std::vector<double>>& numbers, const char* none) {
  if (!numbers) return "auto";
  std::string text;
  for (const double value : *numbers) text += str(text.empty() ? "" : "/", shortest(value));
  return text.empty() ? none : text;
}

struct Row {
  MethodOption option;
  std::function<void(Method&, const std::string&)> set;
  std::function<std::string(const Method&)> get;
};

// In the order in which a default may depend on what stands before it.
const std::vector<Row>& rows() {
  using Text = const std::string&;
  constexpr const char* kMerging = "memory=tempcache";
  constexpr const char* kSparse = "self-attention=annsa";
  constexpr const char* kPruned = "cross-attention=annca";
  static const std::vector<Row> table = {
      {{"memory", "full | window | tempcache | flowcache", "what is kept of the past", ""},
       [](Method& m, Text v) { m.memory.memory = choice(v, kMemories); },
       [](const Method& m) { return m.memory.memory; }},
      {{"sink-frames", "NUMBER", "first frames, kept for ever", "memory=window | memory=tempcache"},
       [](Method& m, Text v) { m.memory.sink_frames = number<int64_t>(v, 0, kMostFrames); },
       [](const Method& m) { return std::to_string(m.memory.sink_frames); }},
      {{"window-frames", "NUMBER", "frames of a window, the sink's included; 0: by the budget",
        "memory=window"},
       [](Method& m, Text v) { m.window_frames = number<int64_t>(v, 0, kMostFrames); },
       [](const Method& m) { return std::to_string(m.window_frames); }},
      {{"memory-budget", "KEYS | BYTES",
        "most that is kept: keys per head and layer (4736), or "
        "bytes in all (64MiB); 0: no limit",
        "memory=window | memory=tempcache | memory=flowcache"},
       [](Method& m, Text v) { m.budget = v == "0" ? MemoryBudget{} : parse_budget(v); },
       [](const Method& m) { return shortest(m.budget.amount) + (m.budget.is_bytes ? "B" : ""); }},
      {{"self-attention", "dense | annsa", "annsa: queries read only the keys that resemble them",
        ""},
       [](Method& m, Text v) { m.sparse_self = choice(v, kSelf); },
       [](const Method& m) { return name_in(m.sparse_self, kSelf); }},
      {{"density", "0..1", "share of the keys that annsa reads", kSparse},
       [](Method& m, Text v) { m.select.density = number<double>(v, 0, 1); },
       [](const Method& m) { return shortest(m.select.density); }},
      {{"buckets", "shared | prompt",
        "annsa: queries meet keys in one index of both, or by the prompt tokens that they match",
        kSparse},
       [](Method& m, Text v) { m.select.buckets = choice(v, kBuckets); },
       [](const Method& m) { return name_in(m.select.buckets, kBuckets); }},
      {{"cross-attention", "dense | annca",
        "annca: a frame reads only the prompt tokens it matches", ""},
       [](Method& m, Text v) { m.sparse_prompt = choice(v, kCross); },
       [](const Method& m) { return name_in(m.sparse_prompt, kCross); }},
      {{"prompt-density", "0..1", "share of the prompt tokens that annca keeps", kPruned},
       [](Method& m, Text v) { m.prompt_select.density = number<double>(v, 0, 1); },
       [](const Method& m) { return shortest(m.prompt_select.density); }},
      {{"prompt-rule", "match | mass",
        "annca ranks tokens by their best match with a query, or by the attention of all", kPruned},
       [](Method& m, Text v) { m.prompt_select.rule = choice(v, kPromptRules); },
       [](const Method& m) { return name_in(m.prompt_select.rule, kPromptRules); }},
      {{"dense-steps", "auto | none | 0+1+...",
        "sampling steps that read everything, from 0 on; auto: as calibrated, or the last 30 %",
        "self-attention=annsa | cross-attention=annca"},
       [](Method& m, Text v) { m.dense_steps = parse_list(v); },
       [](const Method& m) { return list_text(m.dense_steps); }},
      {{"dense-layers", "auto | none | 0+1+...",
        "layers without annsa, from 0 on; auto: as calibrated, or the first 30 %", kSparse},
       [](Method& m, Text v) { m.dense_layers = parse_list(v); },
       [](const Method& m) { return list_text(m.dense_layers); }},
      {{"tile-queries", "NUMBER", "queries that share a choice of annsa", kSparse},
       [](Method& m, Text v) { m.select.tile_queries = number<int64_t>(v, 1, kMostFrames); },
       [](const Method& m) { return std::to_string(m.select.tile_queries); }},
      {{"ann", "lsh | quant", "the index by which like keys are found",
        "memory=tempcache | self-attention=annsa | cross-attention=annca"},
       [](Method& m, Text v) {
         m.memory.tempcache.ann = m.select.ann = m.prompt_select.ann = choice(v, kEngines);
       },
       [](const Method& m) { return name_in(m.memory.tempcache.ann, kEngines); }},
      {{"exact-frames", "NUMBER", "newest frames, which do not merge yet", kMerging},
       [](Method& m, Text v) {
         m.memory.tempcache.exact_frames = number<int64_t>(v, 0, kMostFrames);
       },
       [](const Method& m) { return std::to_string(m.memory.tempcache.exact_frames); }},
      {{"merge-rule", "nats | paper", "keys are alike by the logit error expected, or by cosine",
        kMerging},
       [](Method& m, Text v) {
         TempCacheOptions& merge = m.memory.tempcache;
         merge.rule = choice(v, kRules);
         merge.merge_threshold =
             merge.rule == MergeRule::kPaper ? kPaperThreshold : TempCacheOptions{}.merge_threshold;
       },
       [](const Method& m) { return name_in(m.memory.tempcache.rule, kRules); }},
      {{"merge-threshold", "NUMBER", "merge below so many nats, or above this cosine", kMerging},
       [](Method& m, Text v) {
         const bool paper = m.memory.tempcache.rule == MergeRule::kPaper;
         m.memory.tempcache.merge_threshold = number<double>(v, 0, paper ? 1 : kMostNats);
       },
       [](const Method& m) { return shortest(m.memory.tempcache.merge_threshold); }},
      {{"max-error", "NATS",
        "instead of merge-threshold: most by which the logit of any merged key may be off, for any "
        "query as long as those seen; 0: no limit",
        "merge-rule=nats"},
       [](Method& m, Text v) { m.memory.tempcache.max_error = number<double>(v, 0, kMostNats); },
       [](const Method& m) { return shortest(m.memory.tempcache.max_error); }},
      {{"budget-shares", "even | need",
        "need: heads of a layer share their budgets, so that each keeps what it needs at one error",
        kMerging},
       [](Method& m, Text v) { m.memory.tempcache.shares = choice(v, kShares); },
       [](const Method& m) { return name_in(m.memory.tempcache.shares, kShares); }},
      {{"layer-shares", "even | auto | NUMBER/NUMBER/...",
        "what the layers get of a budget: alike, as calibrated, or a share each", kMerging},
       [](Method& m, Text v) {
         m.layer_shares = parse_numbers(v, "even", kLeastShare, kMostShare);
       },
       [](const Method& m) { return numbers_text(m.layer_shares, "even"); }},
      {{"merge-key", "mean | newest", "the key that stands for merged ones", "merge-rule=nats"},
       [](Method& m, Text v) { m.memory.tempcache.key = choice(v, kKeys); },
       [](const Method& m) { return name_in(m.memory.tempcache.key, kKeys); }},
      {{"merge-bias", "none | logcount | ages", "what is added to its logit", "merge-rule=nats"},
       [](Method& m, Text v) { m.memory.tempcache.bias = choice(v, kBiases); },
       [](const Method& m) { return name_in(m.memory.tempcache.bias, kBiases); }},
      {{"step-cache", "none | teacache | flowcache",
        "sampling steps that change little take over what the layers said before", ""},
       [](Method& m, Text v) { m.step_cache.reuse = choice(v, kStepCaches); },
       [](const Method& m) { return name_in(m.step_cache.reuse, kStepCaches); }},
      {{"step-threshold", "NUMBER",
        "relative change below which a step is not computed; 0: all are",
        "step-cache=teacache | step-cache=flowcache"},
       [](Method& m, Text v) { m.step_cache.threshold = number<double>(v, 0, kMostNats); },
       [](const Method& m) { return shortest(m.step_cache.threshold); }},
      {{"step-polynomial", "auto | none | NUMBER/NUMBER/...",
        "what a change of the noise level's embedding says of a step's, from the constant on; "
        "auto: "
        "as calibrated, or none: the change as it is",
        "step-cache=teacache"},
       [](Method& m, Text v) {
         m.step_cache.polynomial = parse_numbers(v, "none", -kMostCoefficient, kMostCoefficient);
       },
       [](const Method& m) { return numbers_text(m.step_cache.polynomial, "none"); }},
      {{"steps", "NUMBER", "sampling steps a chunk; 0: the model's own", ""},
       [](Method& m, Text v) { m.num_steps = number<int64_t>(v, 0, kMostSteps); },
       [](const Method& m) { return std::to_string(m.num_steps); }},
  };
  return table;
}

const Row& row(const std::string& key) {
  std::string known;
  for (const Row& row : rows()) {
    if (key == row.option.key) return row;
    known += str(known.empty() ? "" : ", ", row.option.key);
  }
  usage(str("method option: expected one of ", known, ", found \"", printable(key), '"'));
}

std::pair<std::string, std::string> key_and_value(const std::string& text) {
  const size_t equals = text.find('=');
  return {text.substr(0, equals), text.substr(equals + 1)};
}

// Whether the option means something beside the others.
bool matters(const MethodOption& option, const Method& method) {
  if (*option.needs == '\0') return true;
  for (const std::string& need : split(option.needs, " | ")) {
    const auto [key, value] = key_and_value(need);
    if (method.get(key) == value && matters(row(key).option, method)) return true;
  }
  return false;
}

// Why the option means nothing: itself, or what it needs and has, but which means nothing either.
const MethodOption& unmet(const MethodOption& option, const Method& method) {
  for (const std::string& need : split(option.needs, " | ")) {
    const auto [key, value] = key_and_value(need);
    if (method.get(key) == value) return unmet(row(key).option, method);
  }
  return option;
}

struct Preset {
  const char* name;
  bool has_engines;  // NAME-lsh and NAME-quant choose the index
  const char* settings;
};

constexpr Preset kPresets[] = {
    {"dense", false, "memory=full"},
    {"window", false, "memory=window"},
    {"tempcache", true, "memory=tempcache"},
    {"annsa", true, "self-attention=annsa"},
    {"annca", true, "cross-attention=annca"},
    {"teacache", false, "step-cache=teacache"},
    {"flowcache", false, "memory=flowcache:step-cache=flowcache"},
    // A merged cache holds little that nobody reads: a quarter of it would be far too little.
    {"all", true, "memory=tempcache:self-attention=annsa:density=0.5:cross-attention=annca"},
};

void apply_preset(const std::string& name, Method& method) {
  for (const Preset& preset : kPresets) {
    for (const std::string& engine : preset.has_engines
                                         ? std::vector<std::string>{"", "lsh", "quant"}
                                         : std::vector<std::string>{""}) {
      if (name != str(preset.name, engine.empty() ? "" : "-", engine)) continue;
      for (const std::string& setting : split(preset.settings, ":")) {
        const auto [key, value] = key_and_value(setting);
        method.set(key, value);
      }
      if (!engine.empty()) method.set("ann", engine);
      return;
    }
  }
  usage(str("method: expected ", method_names(), ", found \"", printable(name), '"'));
}

double bytes_per_page(const ModelSizes& sizes, DType dtype) {
  return static_cast<double>(sizes.num_heads * sizes.num_layers) *
         static_cast<double>(page_bytes(dtype, sizes.head_dim));
}

// Frames that a budget grants a window.
int64_t window_of_budget(const MemoryBudget& budget, const ModelSizes& sizes, DType dtype) {
  const double per_frame = budget.is_bytes ? cache_bytes_per_frame(sizes, dtype)
                                           : static_cast<double>(sizes.frame_tokens);
  return static_cast<int64_t>(std::min(std::floor(budget.amount / per_frame), 1e7));
}

// Keys per head that a budget grants: bytes count whole pages.
int64_t keys_of_budget(const MemoryBudget& budget, const ModelSizes& sizes, DType dtype) {
  if (!budget.is_bytes) return static_cast<int64_t>(std::min(budget.amount, 1e12));
  return static_cast<int64_t>(std::floor(budget.amount / bytes_per_page(sizes, dtype))) *
         kPageTokens;
}

// Shares whose mean is 1.
std::vector<double> relative_shares(std::vector<double> shares, int64_t num_layers) {
  if (shares.empty()) return shares;
  if (static_cast<int64_t>(shares.size()) != num_layers)
    usage(
        str("layer-shares: expected ", num_layers, " of them, one a layer, found ", shares.size()));
  const double mean =
      std::accumulate(shares.begin(), shares.end(), 0.0) / static_cast<double>(shares.size());
  for (double& share : shares) share /= mean;
  return shares;
}

}  // namespace

ModelSizes::ModelSizes(const world::TransformerConfig& config)
    : num_layers(config.num_layers),
      num_heads(config.num_heads),
      head_dim(config.head_dim),
      frame_tokens(config.frame_tokens()),
      rope_time_pairs(config.rope_time_pairs),
      rope_time_theta(config.rope_time_theta) {}

void Method::set(const std::string& key, const std::string& value) {
  const Row& found = row(key);
  try {
    found.set(*this, value);
  } catch (const Error& error) {
    throw Error(error.kind(), str(key, ": ", error.what()));
  }
}

std::string Method::get(const std::string& key) const {
  return row(key).get(*this);
}

std::string Method::to_string() const {
  std::string text;
  for (const Row& row : rows()) {
    if (!matters(row.option, *this)) continue;
    text += str(text.empty() ? "" : ":", row.option.key, '=', row.get(*this));
  }
  return text;
}

std::span<const MethodOption> method_options() {
  static const std::vector<MethodOption> options = [] {
    std::vector<MethodOption> out;
    for (const Row& row : rows()) out.push_back(row.option);
    return out;
  }();
  return options;
}

std::string method_names() {
  std::string names;
  for (const Preset& preset : kPresets)
    names +=
        str(names.empty() ? "" : " | ", preset.name, preset.has_engines ? "[-lsh|-quant]" : "");
  return names;
}

Method make_method(const std::string& preset, const MethodSettings& settings, const Method& base) {
  Method method = base;
  if (!preset.empty()) apply_preset(preset, method);
  for (const auto& [key, value] : settings) {
    row(key);
    if (key == "memory-budget" && value != "0") method.window_frames = 0;
  }
  for (const Row& known : rows()) {  // in the table's order, whatever order was typed
    for (const auto& [key, value] : settings) {
      if (key == known.option.key) method.set(key, value);
    }
  }
  for (const auto& [key, value] : settings) {
    const MethodOption& option = row(key).option;
    if (matters(option, method)) continue;
    const std::string needs = unmet(option, method).needs;
    std::string found;
    for (const std::string& need : split(needs, " | ")) {
      const std::string other = key_and_value(need).first;
      const std::string now = str(other, '=', method.get(other));
      if (found.find(now) == std::string::npos) found += str(found.empty() ? "" : ", ", now);
    }
    usage(str(key, ": expected ", needs, " beside it, found ", found));
  }
  if (method.budget.amount > 0 && method.window_frames > 0 && method.memory.memory == "window")
    usage(str("memory-budget: expected no window-frames beside it, found ", method.window_frames));
  return method;
}

std::pair<std::string, MethodSettings> split_method(const std::string& text) {
  std::string preset;
  MethodSettings settings;
  const std::vector<std::string> parts = split(text, ":");
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool named = parts[i].find('=') != std::string::npos;
    if (i == 0 && !named)
      preset = parts[i];
    else if (i == 1 && !named && preset == "window")
      settings.emplace_back("window-frames", parts[i]);
    else if (named)
      settings.push_back(key_and_value(parts[i]));
    else
      usage(str("method \"", printable(text), "\": expected key=value, found \"",
                printable(parts[i]), '"'));
  }
  return {preset, settings};
}

Method parse_method(const std::string& text) {
  const auto [preset, settings] = split_method(text);
  return make_method(preset, settings);
}

CacheOptions cache_options(const Method& method, const ModelSizes& sizes, DType dtype,
                           int64_t expected_frames) {
  CacheOptions out = method.memory;
  out.dtype = dtype;
  out.num_heads = sizes.num_heads;
  out.head_dim = sizes.head_dim;
  out.tokens_per_frame = sizes.frame_tokens;
  out.reserve_tokens = expected_frames * sizes.frame_tokens;
  out.tempcache.time_pairs = sizes.rope_time_pairs;
  out.tempcache.time_theta = sizes.rope_time_theta;
  const bool limited = method.budget.amount > 0;
  if (out.memory == "window") {
    const int64_t frames = method.window_frames > 0 ? method.window_frames
                           : limited                ? window_of_budget(method.budget, sizes, dtype)
                                     : out.sink_frames + CacheOptions{}.window_frames;
    out.window_frames = frames - out.sink_frames;
    if (out.window_frames < 1)
      usage(str(limited ? "memory-budget" : "window-frames", ": expected room for ",
                out.sink_frames + 1, " frames (sink and one more), found ", frames));
  }
  // Without a budget, as much as a window has.
  out.budget_tokens =
      limited ? keys_of_budget(method.budget, sizes, dtype)
              : (CacheOptions{}.sink_frames + CacheOptions{}.window_frames) * sizes.frame_tokens;
  if (limited) out.tempcache.budget_tokens = keys_of_budget(method.budget, sizes, dtype);
  if (limited && out.memory == "tempcache" && method.layer_shares)
    out.layer_shares = relative_shares(*method.layer_shares, sizes.num_layers);
  return out;
}

int64_t dense_count(int64_t count) {
  return std::llround(0.3 * static_cast<double>(count));
}

Method name_dense_parts(const Method& method, int64_t num_layers) {
  Method out = method;
  const auto name = [](const char* key, int64_t count, int64_t first,
                       std::optional<std::vector<int64_t>>& list) {
    if (!list) {
      list.emplace(static_cast<size_t>(dense_count(count)));
      std::iota(list->begin(), list->end(), first);
    } else if (!list->empty() && list->back() >= count) {
      usage(str(key, ": expected indices in 0..", count - 1, ", found ", list->back()));
    }
  };
  const int64_t steps = method.num_steps;
  if (method.sparse_self || method.sparse_prompt)
    name("dense-steps", steps, steps - dense_count(steps), out.dense_steps);
  if (method.sparse_self) name("dense-layers", num_layers, 0, out.dense_layers);
  return out;
}

void expect_playable(const Method& method, const world::Config& config, DType dtype) {
  cache_options(method, config.transformer, dtype, 0);
  Method steps = method;
  if (steps.num_steps == 0) steps.num_steps = config.sampler.num_steps;
  name_dense_parts(steps, config.transformer.num_layers);
}

double cache_bytes_per_frame(const ModelSizes& sizes, DType dtype) {
  const int64_t pages = (sizes.frame_tokens + kPageTokens - 1) / kPageTokens;
  return static_cast<double>(pages) * bytes_per_page(sizes, dtype);
}

}  // namespace longtake
