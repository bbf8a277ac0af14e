// Matrix products by cuBLASLt: descriptions of those that have run are kept, with the algorithm
// that cuBLASLt's heuristics chose, so that later ones neither ask nor allocate. CUDA builds only.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>

#include "base/dtype.h"

namespace longtake::cuda {

class Runtime;

enum class Epilogue : uint8_t { kNone, kBias, kGelu, kGeluBias };

// out [rows, out] = epilogue(x [rows, in] w^T), w [out, in]; with `w_by_inputs` x w, w [in, out].
// Sums in f32, and products too where operands are f32.
struct MatrixProduct {
  int64_t rows = 0, in = 0, out = 0;
  int64_t x_stride = 0, w_stride = 0, out_stride = 0;  // elements from row to row
  bool w_by_inputs = false;
  DType operands = DType::kF32, result = DType::kF32;
  Epilogue epilogue = Epilogue::kNone;
  DType bias = DType::kF32;

  auto operator<=>(const MatrixProduct&) const = default;
};

class CublasPlans {
 public:
  // Enqueues the product. bias [out]; nullptr without one. False: cuBLASLt has no kernel for it,
  // and nothing was done.
  bool multiply(Runtime& runtime, const MatrixProduct& product, const void* x, const void* w,
                const void* bias, void* out);

 private:
  struct Plan;

  struct Key {
    MatrixProduct product;
    uint32_t x_alignment, w_alignment, out_alignment;

    auto operator<=>(const Key&) const = default;
  };

  struct Delete {
    void operator()(Plan* plan) const;
  };

  std::map<Key, std::unique_ptr<Plan, Delete>> plans_;  // null: there is no kernel
};

}  // namespace longtake::cuda
