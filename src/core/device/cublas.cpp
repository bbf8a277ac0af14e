#include "device/cublas.h"

#include <algorithm>

#include "base/error.h"
#include "device/cuda_runtime.h"

namespace longtake::cuda {
namespace {

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw Error(str("cuBLASLt: ", what, ": ", cublasLtGetStatusString(status)));
}

cudaDataType_t type_of(DType dtype) {
  LONGTAKE_CHECK(dtype == DType::kF32 || dtype == DType::kBF16, name_of(dtype));
  return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
}

cublasLtEpilogue_t epilogue_of(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kBias:
      return CUBLASLT_EPILOGUE_BIAS;
    case Epilogue::kGelu:
      return CUBLASLT_EPILOGUE_GELU;
    case Epilogue::kGeluBias:
      return CUBLASLT_EPILOGUE_GELU_BIAS;
    case Epilogue::kNone:
      break;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

bool has_bias(Epilogue epilogue) {
  return epilogue == Epilogue::kBias || epilogue == Epilogue::kGeluBias;
}

// The power of two, up to 256 bytes, that an address is a multiple of.
uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | 256U;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// cuBLASLt's C handles, owned.
template <typename Handle, cublasStatus_t (*destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  ~Owned() {
    if (handle_ != nullptr) static_cast<void>(destroy(handle_));
  }

  Handle get() const { return handle_; }

  Handle* address() { return &handle_; }

 private:
  Handle handle_ = nullptr;
};

using Description = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

void set(const Description& description, cublasLtMatmulDescAttributes_t attribute,
         const auto& value) {
  check_blas(cublasLtMatmulDescSetAttribute(description.get(), attribute, &value, sizeof value),
             "description");
}

void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const auto& value) {
  check_blas(
      cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
      "preference");
}

// What cuBLASLt calls a matrix: columns of `length` contiguous elements.
void describe(Layout& layout, DType dtype, int64_t length, int64_t columns, int64_t stride) {
  check_blas(
      cublasLtMatrixLayoutCreate(layout.address(), type_of(dtype), static_cast<uint64_t>(length),
                                 static_cast<uint64_t>(columns), stride),
      "layout");
}

}  // namespace

// Our rows are cuBLASLt's columns: out^T = w x^T, so w is its A and x its B.
struct CublasPlans::Plan {
  Description description;
  Layout w, x, out;
  cublasLtMatmulAlgo_t algorithm;
};

void CublasPlans::Delete::operator()(Plan* plan) const {
  delete plan;
}

bool CublasPlans::multiply(Runtime& runtime, const MatrixProduct& product, const void* x,
                           const void* w, const void* bias, void* out) {
  const Key key{product, alignment_of(x), alignment_of(w), alignment_of(out)};
  auto [entry, is_new] = plans_.try_emplace(key);
  if (is_new) {
    std::unique_ptr<Plan, Delete> plan(new Plan);
    check_blas(
        cublasLtMatmulDescCreate(plan->description.address(), CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "description");
    set(plan->description, CUBLASLT_MATMUL_DESC_TRANSA,
        product.w_by_inputs ? CUBLAS_OP_N : CUBLAS_OP_T);
    set(plan->description, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(product.epilogue));
    if (has_bias(product.epilogue)) {
      set(plan->description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
      set(plan->description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(product.bias));
    }
    if (product.w_by_inputs)
      describe(plan->w, product.operands, product.out, product.in, product.w_stride);
    else
      describe(plan->w, product.operands, product.in, product.out, product.w_stride);
    describe(plan->x, product.operands, product.in, product.rows, product.x_stride);
    describe(plan->out, product.result, product.out, product.rows, product.out_stride);
    Preference preference;
    check_blas(cublasLtMatmulPreferenceCreate(preference.address()), "preference");
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        uint64_t{runtime.blas_workspace_bytes()});
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.w_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.x_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.out_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.out_alignment);
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        runtime.blas(), plan->description.get(), plan->w.get(), plan->x.get(), plan->out.get(),
        plan->out.get(), preference.get(), 1, &best, &found);
    if (status == CUBLAS_STATUS_SUCCESS && found == 1) {
      plan->algorithm = best.algo;
      entry->second = std::move(plan);
    }
  }
  if (entry->second == nullptr) return false;
  const Plan& plan = *entry->second;
  if (has_bias(product.epilogue)) set(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const float one = 1, zero = 0;
  check_blas(
      cublasLtMatmul(runtime.blas(), plan.description.get(), &one, w, plan.w.get(), x, plan.x.get(),
                     &zero, out, plan.out.get(), out, plan.out.get(), &plan.algorithm,
                     runtime.blas_workspace(), runtime.blas_workspace_bytes(), runtime.stream()),
      "product");
  return true;
}

}  // namespace longtake::cuda
