// Binds the tensors of a weight file to the fields of a model. A model lists its tensors once, as
// calls on a WeightTable (name in the file, field, shape); the same list loads a model, checks a
// file without loading it, and finds what is missing, mis-shaped or surplus: all of it, in one
// message.
#pragma once

#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "device/context.h"
#include "io/checkpoint.h"
#include "ops/conv.h"
#include "ops/linear.h"
#include "tensor/tensor.h"

namespace longtake {

// What differs in a file that does not hold a linear layer as [out, in] with a bias.
struct LinearForm {
  std::optional<Shape> stored;     // the weight's shape, [out, ...] of in values each
  std::vector<int64_t> row_order;  // row i of the layer is row row_order[i] of the file
  bool has_bias = true;
};

// A 2-D convolution as a file stores it.
struct ConvForm {
  int64_t kernel = 3;
  int stride = 1;
  std::optional<int> padding = std::nullopt;  // zeros on every side; nullopt: kernel / 2
  bool has_bias = true;
  // Frames that a convolution over time sees: the weight is [out, in, taps, kernel, kernel] then,
  // and the layer takes the channels of all taps behind each other, oldest frame first. 0: a weight
  // [out, in, kernel, kernel].
  int64_t taps = 0;
  bool keeps_last_rows = false;  // of a weight with more rows than needed the last ones count
};

class WeightTable {
 public:
  // ctx: whose device weights are packed for; nullptr: check only, fields stay empty. Weights are
  // prepared on the CPU whatever the device.
  WeightTable(const Checkpoint& file, Context* ctx) : file_(file), ctx_(ctx) {}

  // What is listed from here on is packed for another context's device: a model may have parts on
  // several. Does nothing to a table that only checks.
  void pack_for(Context& ctx) {
    if (ctx_ != nullptr) ctx_ = &ctx;
  }

  // Adds scale * B A to the weight of every linear layer for which `lora` holds a pair, in f32:
  // PEFT's names, base_model.model.`name`.lora_A.weight [rank, in] and .lora_B.weight [out, rank].
  // Call before the list; `lora` must outlive the table.
  void merge_lora(const Checkpoint& lora, float scale);

  // `name`.weight [out, in] (floating point, or i8 with `name`.weight.scale) and `name`.bias [out].
  void linear(const std::string& name, int64_t out, int64_t in, DType compute,
              std::optional<LinearWeight>& field, const LinearForm& form = {});

  // Linear layers [out, in] of one input as one layer [parts out, in], whose outputs stand in the
  // names' order.
  void stacked_linear(const std::vector<std::string>& names, int64_t out, int64_t in, DType compute,
                      std::optional<LinearWeight>& field);

  // `name`.weight (floating point, or i8 with `name`.weight.scale) and `name`.bias [out].
  void conv(const std::string& name, int64_t out, int64_t in, DType compute,
            std::optional<ConvWeight>& field, const ConvForm& form = {});

  // A tensor that is kept as f32 whatever its storage: norms, modulations, embeddings.
  void tensor(const std::string& name, const Shape& shape, Tensor& field);

  // Numbers that belong to the model and are in no file: a vector on the fields' device.
  void constant(std::span<const float> values, Tensor& field);

  // The file may hold tensors with names of this beginning; nobody asks for them.
  void ignore(const std::string& beginning) { ignored_.push_back(beginning); }

  // A tensor that must be in the file, and stays there.
  void leave_in_file(const std::string& name, const Shape& shape) {
    find(name, shape, false, true);
  }

  struct Wanted {
    std::string name;
    Shape shape;
  };

  // What was asked for, in order, i8 scales apart: the tensors of a complete file.
  const std::vector<Wanted>& wanted() const { return wanted_; }

  // Bytes of all fields filled so far, as they lie in memory.
  size_t bytes() const { return bytes_; }

  // One line each; surplus tensors of the file included. Call after the whole list.
  std::vector<std::string> problems() const;

  // Throws Error (kInput) that names the first problems and counts the others.
  void finish() const;

 private:
  struct Stored {
    View data;    // of the file, or of `copy`
    View scale;   // of i8 rows, else empty
    Tensor copy;  // what had to be converted: f32
    // Its memory goes when the layer has its own copy, so that loading does not need both.
    const StoredTensor* source = nullptr;
  };

  // nullopt: a problem was noted.
  std::optional<Stored> find(const std::string& name, const Shape& shape, bool may_be_i8,
                             bool stays_in_file = false);
  // A linear layer's weight, with its low-rank update, and its bias; nullopt: a problem was noted.
  std::optional<std::pair<Stored, Stored>> find_linear(const std::string& name, int64_t out,
                                                       int64_t in, const LinearForm& form);
  // Replaces a weight [out, in] by one with the layer's low-rank update, if there is one.
  void add_lora(const std::string& name, const Shape& shape, Stored& weight);

  // The rows that keeps_last_rows asks for, as a shape of the file; `shape` if the file has it.
  Shape with_stored_rows(const std::string& name, const Shape& shape) const;

  // Moves a prepared tensor to where its field lies.
  void keep(Tensor host, Tensor& field);

  // The context that prepares weights.
  Context& host_context();

  const Checkpoint& file_;
  Context* ctx_;
  std::optional<Context> host_;  // when ctx_ is not on the CPU
  const Checkpoint* lora_ = nullptr;
  float lora_scale_ = 1;
  std::set<std::string> used_lora_;
  std::set<std::string> listed_;
  std::vector<Wanted> wanted_;
  std::vector<std::string> ignored_;
  std::vector<std::string> problems_;
  size_t bytes_ = 0;
};

}  // namespace longtake
