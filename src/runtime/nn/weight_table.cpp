#include "nn/weight_table.h"

#include <cstring>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

// value = i8 * scale[row], bf16 widened, or a copy.
void widen(View data, View scale, View out) {
  auto* to = out.data<float>();
  const int64_t count = data.numel();
  switch (data.dtype()) {
    case DType::kF32:
      std::memcpy(to, data.raw(), data.bytes());
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(data.data<bf16>()[i]);
      return;
    case DType::kI8: {
      const int64_t row = count / data.dim(0);
      for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<float>(data.data<int8_t>()[i]) * scale.data<float>()[i / row];
      return;
    }
    default:
      LONGTAKE_CHECK(false, "weight of dtype ", name_of(data.dtype()));
  }
}

}  // namespace

std::optional<WeightTable::Stored> WeightTable::find(const std::string& name, const Shape& shape,
                                                     bool may_be_i8) {
  listed_.insert(name);
  const TensorInfo* info = file_.index().find(name);
  if (info == nullptr) {
    problems_.push_back(str(name, ": expected ", shape.to_string(), ", found no such tensor"));
    return std::nullopt;
  }
  const bool is_i8 = info->dtype == DType::kI8 && may_be_i8;
  const bool is_float = info->dtype == DType::kF32 || info->dtype == DType::kBF16;
  if (!(info->shape == shape) || !(is_float || is_i8)) {
    problems_.push_back(str(name, ": expected ", may_be_i8 ? "f32, bf16 or i8 " : "f32 or bf16 ",
                            shape.to_string(), ", found ", name_of(info->dtype), " ",
                            info->shape.to_string()));
    if (is_i8) listed_.insert(name + ".scale");
    return std::nullopt;
  }
  Stored stored{file_.view(*info), View()};
  if (is_i8) {
    const std::string scale_name = name + ".scale";
    listed_.insert(scale_name);
    const TensorInfo* scale = file_.index().find(scale_name);
    if (scale == nullptr || scale->dtype != DType::kF32 || !(scale->shape == Shape{shape[0]})) {
      problems_.push_back(str(
          scale_name, ": expected f32 ", Shape{shape[0]}.to_string(), ", found ",
          scale ? str(name_of(scale->dtype), " ", scale->shape.to_string()) : "no such tensor"));
      return std::nullopt;
    }
    stored.scale = file_.view(*scale);
  }
  return stored;
}

void WeightTable::linear(const std::string& name, int64_t out, int64_t in, DType compute,
                         std::optional<LinearWeight>& field) {
  const auto weight = find(name + ".weight", Shape{out, in}, true);
  Tensor bias;
  tensor(name + ".bias", Shape{out}, bias);
  if (!weight || bias.empty()) return;
  field.emplace(*ctx_, weight->data, weight->scale, bias, compute);
  bytes_ += field->bytes() - bias.bytes();
}

void WeightTable::conv3x3(const std::string& name, int64_t out, int64_t in, int stride,
                          DType compute, std::optional<ConvWeight>& field) {
  const auto weight = find(name + ".weight", Shape{out, in, 3, 3}, true);
  Tensor bias;
  tensor(name + ".bias", Shape{out}, bias);
  if (!weight || bias.empty()) return;
  field.emplace(*ctx_, weight->data, weight->scale, bias, stride, /*padding=*/1, compute);
  bytes_ += field->bytes() - bias.bytes();
}

void WeightTable::tensor(const std::string& name, const Shape& shape, Tensor& field) {
  const auto stored = find(name, shape, shape.rank() > 1);
  if (!stored || ctx_ == nullptr) return;
  field = Tensor(ctx_->device(), DType::kF32, shape);
  widen(stored->data, stored->scale, field);
  bytes_ += field.bytes();
}

std::vector<std::string> WeightTable::problems() const {
  std::vector<std::string> out = problems_;
  for (const TensorInfo& info : file_.index().tensors) {
    if (listed_.count(info.name) == 0)
      out.push_back(str(printable(info.name), ": expected no such tensor, found ",
                        name_of(info.dtype), " ", info.shape.to_string()));
  }
  return out;
}

void WeightTable::finish() const {
  const auto all = problems();
  if (all.empty()) return;
  std::string message = str(file_.path(), ": expected the model's tensors, found ", all.size(),
                            all.size() == 1 ? " that differs" : " that differ");
  for (const std::string& problem : all) message += "; " + problem;
  throw Error(ErrorKind::kInput, message);
}

}  // namespace longtake
