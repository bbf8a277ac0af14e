// Binds the tensors of a weight file to the fields of a model. A model lists its tensors once, as
// calls on a WeightTable (name in the file, field, shape); the same list loads a model, checks a
// file without loading it, and finds what is missing, mis-shaped or surplus: all of it, in one
// message.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "device/context.h"
#include "io/safetensors.h"
#include "ops/conv.h"
#include "ops/linear.h"
#include "tensor/tensor.h"

namespace longtake {

class WeightTable {
 public:
  // ctx: where weights are packed; nullptr: check only, fields stay empty.
  WeightTable(const SafetensorsFile& file, Context* ctx) : file_(file), ctx_(ctx) {}

  // `name`.weight [out, in] (f32 | bf16 | i8 with `name`.weight.scale) and `name`.bias [out].
  void linear(const std::string& name, int64_t out, int64_t in, DType compute,
              std::optional<LinearWeight>& field);

  // `name`.weight [out, in, 3, 3] and `name`.bias [out]; zero padding 1.
  void conv3x3(const std::string& name, int64_t out, int64_t in, int stride, DType compute,
               std::optional<ConvWeight>& field);

  // A tensor that is kept as f32 whatever its storage: norms, modulations, embeddings.
  void tensor(const std::string& name, const Shape& shape, Tensor& field);

  // Bytes of all fields filled so far, as they lie in memory.
  size_t bytes() const { return bytes_; }

  // One line each; surplus tensors of the file included. Call after the whole list.
  std::vector<std::string> problems() const;

  // Throws Error (kInput) with every problem.
  void finish() const;

 private:
  struct Stored {
    View data;
    View scale;  // of i8 rows, else empty
  };

  // nullopt: a problem was noted.
  std::optional<Stored> find(const std::string& name, const Shape& shape, bool may_be_i8);

  const SafetensorsFile& file_;
  Context* ctx_;
  std::set<std::string> listed_;
  std::vector<std::string> problems_;
  size_t bytes_ = 0;
};

}  // namespace longtake
