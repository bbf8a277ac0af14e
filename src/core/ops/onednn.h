// oneDNN behind linear and conv2d: engine, stream, tensor types and the cache of primitives.
// Private to the CPU twins.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/context.h"
#include "dnnl.hpp"
#include "tensor/tensor.h"

namespace longtake::onednn {

const dnnl::engine& engine();

dnnl::memory::data_type type_of(DType dtype);

// Views `view`'s bytes as `desc`. No copy.
dnnl::memory memory_of(const dnnl::memory::desc& desc, View view);

// weight [as `plain`], converted and packed as `packed`.
dnnl::memory pack(View weight, View scale, const dnnl::memory::dims& dims,
                  dnnl::memory::format_tag plain, const dnnl::memory::desc& packed);

// weight in another layout; the same memory when it has that layout already.
dnnl::memory repacked(const dnnl::memory& weight, const dnnl::memory::desc& packed);

// Bias as a primitive's argument; empty memory when there is none.
dnnl::memory copy_bias(View bias);

// A built kernel and how its arguments look.
struct Primitive {
  dnnl::primitive primitive;
  dnnl::memory::desc src, dst, scratchpad;
  dnnl::memory weight = {};  // when kernels of one layer want different layouts
};

// Runs with scratch memory from ctx's workspace and ctx's number of threads.
void execute(Context& ctx, const Primitive& primitive, View src, const dnnl::memory& weight,
             const dnnl::memory& bias, View dst);

// Primitives of one weight by the shape they serve. Entries stay for the weight's life.
template <typename Key>
class PrimitiveCache {
 public:
  template <typename Make>
  const Primitive& get(const Key& key, const Make& make) {
    const std::lock_guard lock(mutex_);
    for (const auto& [known, primitive] : entries_) {
      if (known == key) return *primitive;
    }
    entries_.emplace_back(key, std::make_unique<Primitive>(make()));
    return *entries_.back().second;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<Key, std::unique_ptr<Primitive>>> entries_;
};

}  // namespace longtake::onednn
