// CommitBatch: what commits of CUDA caches have to do besides storing the chunk, which many layers
// do in one set of launches. A commit adds what describes it; run() enqueues all of it. CUDA builds
// only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

#include "device/cuda_check.h"
#include "device/cuda_runtime.h"
#include "kv/device_groups.h"
#include "kv/device_pages.h"

namespace longtake {

class CommitBatch {
 public:
  explicit CommitBatch(cuda::Runtime& runtime) : runtime_(runtime) {}

  // Layers that merge keys; pages that were written, of stores that have summaries; the tables of
  // all that commit. What is described must be alike but for pointers and pages (device_groups.h).
  void add(const cuda::Groups& groups) { groups_.push_back(groups); }

  void add(const cuda::PageSummaries& summaries, const cuda::SummaryJob& job);

  void add(const cuda::Table& table) { tables_.push_back(table); }

  // Which run() will see to what is added now.
  int64_t round() const { return round_; }

  void run();

  // The same layers for other launches than run()'s, until the next call.
  cuda::GroupBatch on_device(const cuda::Groups& groups);

 private:
  // Descriptions lie on the device for as long as records may speak of them: what is the same as
  // before is not written again, so that a steady step writes nothing, and what is first said in a
  // record is written by the record.
  template <typename T>
  class Described {
   public:
    struct One {
      std::vector<T> host;
      T* device;
      bool is_written;
    };

    const One& of(const std::vector<T>& host, cudaStream_t stream);

   private:
    std::list<One> known_;
    std::list<cuda::DeviceArray<T>> blocks_;
    size_t used_ = 0;  // of the last block
  };

  cuda::GroupBatch batch_of(const std::vector<cuda::Groups>& groups);

  cuda::Runtime& runtime_;
  int64_t round_ = 1;
  std::vector<cuda::Groups> groups_;
  std::vector<cuda::SummaryJob> summaries_;
  const cuda::PageSummaries* kind_ = nullptr;  // of the summaries
  std::vector<cuda::Table> tables_;
  Described<cuda::Groups> known_groups_;
  Described<cuda::SummaryJob> known_summaries_;
  Described<cuda::Table> known_tables_;
};

}  // namespace longtake
