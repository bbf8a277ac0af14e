#include "nn/weight_table.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "ops/elementwise.h"
#include "ops/widen.h"

namespace longtake {
namespace {

bool is_floating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16 ||
         dtype == DType::kF64;
}

// Rows of `weight` [out, ...] in another order, as f32.
Tensor reorder_rows(View weight, View scale, const std::vector<int64_t>& order) {
  const Tensor wide(weight.device(), DType::kF32, weight.shape());
  widen(weight, scale, wide);
  Tensor out(weight.device(), DType::kF32, weight.shape());
  for (size_t i = 0; i < order.size(); ++i) {
    const auto to = static_cast<int64_t>(i);
    const View from = wide.view().rows(order[i], order[i] + 1);
    std::memcpy(out.view().rows(to, to + 1).raw(), from.raw(), from.bytes());
  }
  return out;
}

// [out, in, taps, h, w] -> [out, taps, in, h, w], as f32.
Tensor taps_to_channels(View weight, View scale) {
  const Tensor wide(weight.device(), DType::kF32, weight.shape());
  widen(weight, scale, wide);
  const int64_t in = weight.dim(1);
  const int64_t taps = weight.dim(2);
  const int64_t area = weight.dim(3) * weight.dim(4);
  Tensor out(weight.device(), DType::kF32, {weight.dim(0), taps, in, weight.dim(3), weight.dim(4)});
  const float* from = wide.data<float>();
  for (int64_t row = 0; row < weight.dim(0); ++row) {
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t t = 0; t < taps; ++t, from += area)
        std::copy_n(from, area, out.data<float>() + ((row * taps + t) * in + i) * area);
    }
  }
  return out;
}

}  // namespace

std::optional<WeightTable::Stored> WeightTable::find(const std::string& name, const Shape& shape,
                                                     bool may_be_i8, bool stays_in_file) {
  listed_.insert(name);
  wanted_.push_back({name, shape});
  const StoredTensor* tensor = file_.find(name);
  if (tensor == nullptr) {
    problems_.push_back(str(name, ": expected ", shape.to_string(), ", found no such tensor"));
    return std::nullopt;
  }
  const bool is_i8 = tensor->dtype == DType::kI8 && may_be_i8 && tensor->is_dense();
  if (!(tensor->shape == shape) || !(is_floating(tensor->dtype) || is_i8)) {
    problems_.push_back(
        str(name, ": expected ", may_be_i8 ? "floating point or i8 " : "floating point ",
            shape.to_string(), ", found ", name_of(tensor->dtype), " ", tensor->shape.to_string()));
    if (is_i8) listed_.insert(name + ".scale");
    return std::nullopt;
  }
  Stored stored;
  if (is_i8) {
    const std::string scale_name = name + ".scale";
    listed_.insert(scale_name);
    const StoredTensor* scale = file_.find(scale_name);
    if (scale == nullptr || scale->dtype != DType::kF32 || !scale->is_dense() ||
        !(scale->shape == Shape{shape[0]})) {
      problems_.push_back(str(
          scale_name, ": expected f32 ", Shape{shape[0]}.to_string(), ", found ",
          scale ? str(name_of(scale->dtype), " ", scale->shape.to_string()) : "no such tensor"));
      return std::nullopt;
    }
    stored.scale = scale->view();
  }
  if (ctx_ == nullptr || stays_in_file) return stored;
  stored.source = tensor;
  const bool as_it_is = tensor->dtype == DType::kF32 || tensor->dtype == DType::kBF16 || is_i8;
  if (as_it_is && tensor->is_dense()) {
    stored.data = tensor->view();
  } else {
    stored.copy = Tensor({}, DType::kF32, shape);
    read_tensor(*tensor, stored.copy);
    stored.data = stored.copy;
  }
  return stored;
}

void WeightTable::merge_lora(const Checkpoint& lora, float scale) {
  lora_ = &lora;
  lora_scale_ = scale;
}

void WeightTable::add_lora(const std::string& name, const Shape& shape, Stored& weight) {
  if (lora_ == nullptr) return;
  const std::string base = str("base_model.model.", name, ".lora_");
  const StoredTensor* a = lora_->find(base + "A.weight");
  const StoredTensor* b = lora_->find(base + "B.weight");
  if (a == nullptr && b == nullptr) return;
  for (const char* part : {"A.weight", "B.weight"}) used_lora_.insert(base + part);
  const bool fits = a != nullptr && b != nullptr && a->shape.rank() == 2 && b->shape.rank() == 2 &&
                    a->shape[1] == shape[1] && b->shape[0] == shape[0] &&
                    a->shape[0] == b->shape[1] && a->shape[0] > 0 && is_floating(a->dtype) &&
                    is_floating(b->dtype);
  if (!fits) {
    problems_.push_back(str(base, "{A,B}.weight: expected floats [rank, ", shape[1], "] and [",
                            shape[0], ", rank], found ", a ? a->shape.to_string() : "none", " and ",
                            b ? b->shape.to_string() : "none"));
    return;
  }
  if (ctx_ == nullptr) return;
  // B A as a linear layer with weight A^T, applied to B.
  StoredTensor turned = *a;
  std::swap(turned.shape[0], turned.shape[1]);
  std::swap(turned.strides[0], turned.strides[1]);
  const Tensor a_turned({}, DType::kF32, turned.shape);
  const Tensor b_wide({}, DType::kF32, b->shape);
  read_tensor(turned, a_turned);
  read_tensor(*b, b_wide);
  Context& host = host_context();
  const LinearWeight product(host, a_turned, View(), View(), DType::kF32);
  const Tensor update({}, DType::kF32, shape);
  longtake::linear(host, b_wide, product, Activation::kNone, update);
  Tensor merged({}, DType::kF32, shape);
  widen(weight.data.reshape(shape), weight.scale, merged);
  axpby(host, 1, merged, lora_scale_, update, merged);
  weight = {merged, View(), std::move(merged), weight.source};
}

std::optional<std::pair<WeightTable::Stored, WeightTable::Stored>> WeightTable::find_linear(
    const std::string& name, int64_t out, int64_t in, const LinearForm& form) {
  const Shape shape{out, in};
  auto weight = find(name + ".weight", form.stored.value_or(shape), true);
  auto bias = form.has_bias ? find(name + ".bias", Shape{out}, false) : Stored();
  if (!weight || !bias) return std::nullopt;
  add_lora(name, shape, *weight);
  return std::pair(std::move(*weight), std::move(*bias));
}

void WeightTable::linear(const std::string& name, int64_t out, int64_t in, DType compute,
                         std::optional<LinearWeight>& field, const LinearForm& form) {
  const Shape shape{out, in};
  auto found = find_linear(name, out, in, form);
  if (!found || ctx_ == nullptr) return;
  auto& [weight, bias] = *found;
  Tensor wide_bias;
  if (form.has_bias) {
    wide_bias = Tensor({}, DType::kF32, {out});
    widen(bias.data, View(), wide_bias);
  }
  if (!form.row_order.empty()) {
    weight.copy = reorder_rows(weight.data, weight.scale, form.row_order);
    weight.data = weight.copy;
    weight.scale = View();
    if (form.has_bias) wide_bias = reorder_rows(wide_bias, View(), form.row_order);
  }
  field.emplace(*ctx_, weight.data.reshape(shape), weight.scale, wide_bias, compute);
  weight.source->release();
  bytes_ += field->bytes();
}

void WeightTable::stacked_linear(const std::vector<std::string>& names, int64_t out, int64_t in,
                                 DType compute, std::optional<LinearWeight>& field) {
  std::vector<std::pair<Stored, Stored>> parts;
  for (const std::string& name : names) {
    auto found = find_linear(name, out, in, {});
    if (found) parts.push_back(std::move(*found));
  }
  if (parts.size() < names.size() || ctx_ == nullptr) return;
  const int64_t rows = out * static_cast<int64_t>(parts.size());
  const Tensor weights({}, DType::kF32, {rows, in});
  const Tensor biases({}, DType::kF32, {rows});
  int64_t begin = 0;
  for (const auto& [weight, bias] : parts) {
    widen(weight.data.reshape({out, in}), weight.scale, weights.view().rows(begin, begin + out));
    widen(bias.data, View(), biases.view().rows(begin, begin + out));
    weight.source->release();
    begin += out;
  }
  field.emplace(*ctx_, weights, View(), biases, compute);
  bytes_ += field->bytes();
}

Shape WeightTable::with_stored_rows(const std::string& name, const Shape& shape) const {
  const StoredTensor* tensor = file_.find(name);
  Shape out = shape;
  if (tensor != nullptr && tensor->shape.rank() == shape.rank())
    out[0] = std::max(shape[0], tensor->shape[0]);
  return out;
}

void WeightTable::conv(const std::string& name, int64_t out, int64_t in, DType compute,
                       std::optional<ConvWeight>& field, const ConvForm& form) {
  const int64_t taps = std::max<int64_t>(form.taps, 1);
  Shape stored = form.taps > 0 ? Shape{out, in, taps, form.kernel, form.kernel}
                               : Shape{out, in, form.kernel, form.kernel};
  if (form.keeps_last_rows) stored = with_stored_rows(name + ".weight", stored);
  auto weight = find(name + ".weight", stored, true);
  const auto bias = form.has_bias ? find(name + ".bias", Shape{out}, false) : Stored();
  if (!weight || !bias || ctx_ == nullptr) return;
  if (stored[0] > out) {
    weight->data = weight->data.rows(stored[0] - out, stored[0]);
    if (!weight->scale.empty()) weight->scale = weight->scale.rows(stored[0] - out, stored[0]);
  }
  if (taps > 1) {
    weight->copy = taps_to_channels(weight->data, weight->scale);
    weight->data = weight->copy;
    weight->scale = View();
  }
  Tensor wide_bias;
  if (form.has_bias) {
    wide_bias = Tensor({}, DType::kF32, {out});
    widen(bias->data, View(), wide_bias);
  }
  field.emplace(*ctx_, weight->data.reshape({out, taps * in, form.kernel, form.kernel}),
                weight->scale, wide_bias, form.stride,
                form.padding.value_or(static_cast<int>(form.kernel / 2)), compute);
  weight->source->release();
  bytes_ += field->bytes();
}

void WeightTable::tensor(const std::string& name, const Shape& shape, Tensor& field) {
  const auto stored = find(name, shape, shape.rank() > 1);
  if (!stored || ctx_ == nullptr) return;
  Tensor wide({}, DType::kF32, shape);
  widen(stored->data, stored->scale, wide);
  keep(std::move(wide), field);
}

void WeightTable::constant(std::span<const float> values, Tensor& field) {
  if (ctx_ == nullptr) return;
  Tensor copy({}, DType::kF32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), copy.data<float>());
  keep(std::move(copy), field);
}

void WeightTable::keep(Tensor host, Tensor& field) {
  field = ctx_->device().kind == DeviceKind::kCpu ? std::move(host) : host.to(ctx_->device());
  bytes_ += field.bytes();
}

Context& WeightTable::host_context() {
  if (ctx_->device().kind == DeviceKind::kCpu) return *ctx_;
  if (!host_) host_.emplace(Device{}, ctx_->threads());
  return *host_;
}

std::vector<std::string> WeightTable::problems() const {
  std::vector<std::string> out = problems_;
  const auto add_surplus = [&](const Checkpoint& file, const std::set<std::string>& known) {
    for (const StoredTensor& tensor : file.tensors()) {
      const auto is_beginning = [&](const std::string& part) {
        return tensor.name.starts_with(part);
      };
      if (known.count(tensor.name) == 0 &&
          std::none_of(ignored_.begin(), ignored_.end(), is_beginning))
        out.push_back(str(printable(tensor.name), ": expected no such tensor, found ",
                          name_of(tensor.dtype), " ", tensor.shape.to_string()));
    }
  };
  add_surplus(file_, listed_);
  if (lora_ != nullptr) add_surplus(*lora_, used_lora_);
  return out;
}

void WeightTable::finish() const {
  const auto all = problems();
  if (all.empty()) return;
  std::string message = str(file_.path(), ": expected the model's tensors, found ", all.size(),
                            all.size() == 1 ? " that differs" : " that differ");
  constexpr size_t kMostNamed = 10;  // of a checkpoint of another model hundreds differ
  for (size_t i = 0; i < std::min(all.size(), kMostNamed); ++i) message += "; " + all[i];
  if (all.size() > kMostNamed) message += str("; and ", all.size() - kMostNamed, " more");
  throw Error(ErrorKind::kInput, message);
}

}  // namespace longtake
