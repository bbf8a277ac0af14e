// Products on the residual stream on the GPU, a launch each where rows are few
// (ops/stream_product.cuh). Many rows, f32 and sizes that do not suit take the ops of which these
// are composed.
#include "device/dispatch.h"
#include "ops/activation.cuh"
#include "ops/copy.h"
#include "ops/stream_product.cuh"

namespace longtake::cuda {
namespace {

// ---- what becomes of two neighbouring outputs ----

// An End whose threads finish their outputs apart, by finish().
template <typename End, bool kHeads = false>
struct ByPairs {
  static constexpr bool kNormsHeads = kHeads;

  __device__ void bring(bf16*) const {}

  template <int kPairs, typename RowOf, typename Loaded>
  __device__ void finish_tile(const Product& p, int first_row, const RowOf& row_of, int column,
                              const float2 (&v)[kPairs], const Loaded (&loaded)[kPairs],
                              void*) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      static_cast<const End*>(this)->finish(p, first_row + row_of(i), column, v[i], loaded[i]);
  }
};

template <typename Out>
struct Write : ByPairs<Write<Out>> {
  Out* out;
  Activation activation;

  Write(Out* to, Activation with) : out(to), activation(with) {}

  struct Loaded {};

  __device__ int first_column(int columns) const { return blockIdx.x * columns; }

  __device__ Loaded load(const Product&, int, int) const { return {}; }

  __device__ void finish(const Product& p, int row, int column, float2 v, Loaded) const {
    if (row >= p.rows || column >= p.out) return;
    Out* to = out + int64_t{row} * p.out + column;
    v = {activated(v.x, activation), activated(v.y, activation)};
    if constexpr (sizeof(Out) == 2) {
      *reinterpret_cast<uint32_t*>(to) = bf16_pair(v.x, v.y);
    } else {
      *reinterpret_cast<float2*>(to) = v;
    }
  }
};

struct Add : ByPairs<Add> {
  const float* base;
  float* x;
  Gate gate;

  Add(const float* from, float* to, const Gate& by) : base(from), x(to), gate(by) {}

  struct Loaded {
    float2 base, gate;
  };

  __device__ int first_column(int columns) const { return blockIdx.x * columns; }

  __device__ Loaded load(const Product& p, int row, int column) const {
    if (row >= p.rows || column >= p.out) return {};
    Loaded loaded{*reinterpret_cast<const float2*>(base + int64_t{row} * p.out + column), {1, 1}};
    if (gate.is_there)
      loaded.gate = *reinterpret_cast<const float2*>(gate.vectors.of(row) + column);
    return loaded;
  }

  __device__ void finish(const Product& p, int row, int column, float2 v, Loaded loaded) const {
    if (row >= p.rows || column >= p.out) return;
    v = {fmaf(v.x, loaded.gate.x, loaded.base.x), fmaf(v.y, loaded.gate.y, loaded.base.y)};
    if (gate.rounds) v = {round_to_bf16(v.x), round_to_bf16(v.y)};
    *reinterpret_cast<float2*>(x + int64_t{row} * p.out + column) = v;
  }
};

// The blocks of a cluster have all heads of 16 rows of a part, z of the grid.
struct ToHeads : ByPairs<ToHeads, true> {
  const float* cos;
  const float* sin;
  int dim, head_dim;
  float eps;
  int columns[kMaxHeadParts];  // where a part begins
  const float* norms[kMaxHeadParts];
  bool rotates[kMaxHeadParts];
  bf16* outs[kMaxHeadParts];

  __device__ const float* heads_norm() const { return norms[blockIdx.z]; }

  struct Loaded {
    float2 norm;
    float cos, sin;
  };

  __device__ int first_column(int columns_of_block) const {
    return columns[blockIdx.z] + blockIdx.x * columns_of_block;
  }

  __device__ Loaded load(const Product& p, int row, int column) const {
    Loaded loaded{{1, 1}, 1, 0};
    const int channel = column - columns[blockIdx.z];
    if (norms[blockIdx.z] != nullptr)
      loaded.norm = *reinterpret_cast<const float2*>(norms[blockIdx.z] + channel);
    if (rotates[blockIdx.z] && row < p.rows) {
      const int64_t pair = int64_t{row} * (head_dim / 2) + channel % head_dim / 2;
      loaded.cos = cos[pair];
      loaded.sin = sin[pair];
    }
    return loaded;
  }

  __device__ void finish(const Product& p, int row, int column, float2 v, Loaded loaded) const {
    if (row >= p.rows) return;
    const int channel = column - columns[blockIdx.z];
    const float2 turned{v.x * loaded.cos - v.y * loaded.sin, v.x * loaded.sin + v.y * loaded.cos};
    *reinterpret_cast<uint32_t*>(outs[blockIdx.z] + int64_t{row} * dim + channel) =
        bf16_pair(turned.x, turned.y);
  }
};

// Columns of a block, so that there are as many blocks as multiprocessors; 0: a launch of several
// ops does it.
int choose_columns(Context& ctx, const Product& p) {
  const unsigned tiles = blocks_of(p.rows, kTileRows);
  const auto most = static_cast<unsigned>(ctx.cuda()->num_multiprocessors());
  if (fits(ctx, p, 64) && blocks_of(p.out, 64) * tiles >= most) return 64;
  return fits(ctx, p, 32) ? 32 : 0;
}

template <bool kNormed, typename End>
void launch_columns(Context& ctx, const char* op, const Product& p, const NormVectors& norm,
                    const End& end, int columns) {
  const dim3 grid(blocks_of(p.out, columns), blocks_of(p.rows, kTileRows));
  const auto run =
      columns == 64 ? launch_product<64, kNormed, End> : launch_product<32, kNormed, End>;
  run(ctx, op, p, norm, end, grid, 1, 0);
}

// In the workspace.
View normed_rows(Context& ctx, View x, const StreamNorm& norm, DType compute) {
  const View h = ctx.workspace().take(compute, x.shape());
  cuda::frame_layer_norm(ctx, x, norm.scale, norm.shift, norm.eps, norm.scale_plus_one, h);
  return h;
}

// Whether a cluster norms the heads of these parts; `to` describes them then.
bool heads_of(Context& ctx, const Product& p, std::span<const HeadPart> all, View cos, View sin,
              float eps, ToHeads& to, unsigned& count) {
  const auto dim = p.out / static_cast<int>(all.size());
  bool good = ctx.cuda()->is_hopper_or_later() && dim % kHeadColumns == 0 &&
              dim <= kHeadColumns * static_cast<int>(kMostHeadBlocks) && fits(ctx, p, kHeadColumns);
  to.cos = cos.empty() ? nullptr : cos.data<float>();
  to.sin = sin.empty() ? nullptr : sin.data<float>();
  to.dim = dim;
  to.eps = eps;
  count = 0;
  for (size_t i = 0; i < all.size() && good; ++i) {
    const HeadPart& part = all[i];
    if (part.out.empty()) continue;
    good = part.out.dtype() == DType::kBF16 && starts_in_pairs(part.out.raw()) &&
           (part.norm.empty() || starts_in_pairs(part.norm.raw()));
    if (!good) break;
    to.head_dim = static_cast<int>(part.out.dim(2));
    to.columns[count] = static_cast<int>(i) * dim;
    to.norms[count] = part.norm.empty() ? nullptr : part.norm.data<float>();
    to.rotates[count] = part.rotates;
    to.outs[count] = part.out.data<bf16>();
    ++count;
  }
  return good;
}

}  // namespace

void norm_linear(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                 Activation activation, View out) {
  const NormVectors vectors = stream_norm_of(x, norm);
  if (suits(x, weight, vectors) && starts_in_pairs(out.raw())) {
    const Product p = product_of(x, weight);
    if (const int columns = choose_columns(ctx, p); columns > 0) {
      return for_float_type(out.dtype(), [&]<typename Out>() {
        launch_columns<true>(ctx, "norm_linear", p, vectors,
                             Write<Out>(out.data<Out>(), activation), columns);
      });
    }
  }
  const Workspace::Scope scope(ctx.workspace());
  cuda::linear(ctx, normed_rows(ctx, x, norm, weight.compute_dtype()), weight, activation, out);
}

void norm_linear_heads(Context& ctx, View x, const StreamNorm& norm, const LinearWeight& weight,
                       std::span<const HeadPart> parts, View cos, View sin, float eps) {
  const NormVectors vectors = stream_norm_of(x, norm);
  if (suits(x, weight, vectors)) {
    const Product p = product_of(x, weight);
    ToHeads to;
    unsigned count = 0;
    if (heads_of(ctx, p, parts, cos, sin, eps, to, count)) {
      const auto blocks = static_cast<unsigned>(to.dim / kHeadColumns);
      return launch_product<kHeadColumns, true>(ctx, "norm_linear_heads", p, vectors, to,
                                                dim3(blocks, blocks_of(p.rows, kTileRows), count),
                                                blocks);
    }
  }
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, {x.dim(0), weight.out_features()});
  cuda::norm_linear(ctx, x, norm, weight, Activation::kNone, wide);
  cuda::split_heads(ctx, wide, parts, cos, sin, eps);
}

void add_linear(Context& ctx, View y, const LinearWeight& weight, const FrameVectors& gate,
                DType residual, View base, View x) {
  const Add end(base.data<float>(), x.data<float>(),
                {framed(gate, x.dim(0), x.dim(1)), !gate.frames.empty(), residual == DType::kBF16});
  if (suits(y, weight) && starts_in_pairs(x.raw()) && starts_in_pairs(base.raw()) &&
      (gate.frames.empty() || start_in_fours(end.gate.vectors))) {
    const Product p = product_of(y, weight);
    if (const int columns = choose_columns(ctx, p); columns > 0)
      return launch_columns<false>(ctx, "add_linear", p, NormVectors{}, end, columns);
  }
  const Workspace::Scope scope(ctx.workspace());
  const View wide = ctx.workspace().take(DType::kF32, x.shape());
  cuda::linear(ctx, y, weight, Activation::kNone, wide);
  if (base.raw() != x.raw()) longtake::copy(ctx, base, x);
  cuda::add_frames(ctx, x, wide, gate, residual);
}

}  // namespace longtake::cuda
