// The state of a CUDA cache as bytes: those that the CPU's cache writes, so that a session saved on
// one device resumes on the other. The keys of a head come in runs, each of which starts a page of
// its own there and here: frames, groups, or all tokens.
#include <algorithm>
#include <cstring>
#include <istream>
#include <ostream>

#include "base/error.h"
#include "kv/device_cache_base.h"
#include "kv/device_weight.h"
#include "kv/state_stream.h"

namespace longtake::cuda {
namespace {

// Bytes from a matrix of a page to a number of it.
size_t offset_in(PageFormat format, int head_dim, int row, int channel) {
  if (format == PageFormat::kF32) return static_cast<size_t>(row * head_dim + channel) * 4;
  const int chunk = channel / 8;
  return static_cast<size_t>(chunk / 8 * (kPageKeys * 128) + row * 128 +
                             ((chunk % 8 ^ row % 8) * 16) + channel % 8 * 2);
}

// A page of the device's kind in host memory.
class HostedPage {
 public:
  explicit HostedPage(const PageLayout& layout)
      : layout_(layout), bytes_(layout.page_bytes()), size_(bytes_.size()) {}

  std::byte* data() { return bytes_.data(); }

  size_t size() const { return size_; }

  float& weight(int row) {
    return reinterpret_cast<float*>(bytes_.data() + size_ - kPageKeys * sizeof(float))[row];
  }

  void read(bool value, int row, float* out) {
    for (int d = 0; d < layout_.head_dim; ++d) {
      const std::byte* at = place(value, row, d);
      bf16 narrow;
      if (layout_.format == PageFormat::kF32)
        std::memcpy(out + d, at, sizeof(float));
      else
        std::memcpy(&narrow, at, sizeof narrow);
      if (layout_.format != PageFormat::kF32) out[d] = static_cast<float>(narrow);
    }
  }

  void write(bool value, int row, const float* in) {
    for (int d = 0; d < layout_.head_dim; ++d) {
      const bf16 narrow(in[d]);
      if (layout_.format == PageFormat::kF32)
        std::memcpy(place(value, row, d), in + d, sizeof(float));
      else
        std::memcpy(place(value, row, d), &narrow, sizeof narrow);
    }
  }

 private:
  std::byte* place(bool value, int row, int channel) {
    const size_t matrix = (size_ - kPageKeys * sizeof(float)) / 2;
    return bytes_.data() + (value ? matrix : 0) +
           offset_in(layout_.format, layout_.head_dim, row, channel);
  }

  PageLayout layout_;
  std::vector<std::byte> bytes_;
  size_t size_;
};

}  // namespace

std::vector<KeyRun> DeviceCache::frame_runs(int head, int64_t held, int64_t ring_frames,
                                            bool sink) const {
  std::vector<KeyRun> out;
  const int64_t first = std::max(int64_t{frames_.sink}, held - ring_frames);
  const int64_t begin = sink ? 0 : first;
  const int64_t end = sink ? std::min(held, int64_t{frames_.sink}) : held;
  for (int64_t index = begin; index < end; ++index) {
    KeyRun run{frames_.tokens, {}, {}};
    run.shares_last = !sink && frames_.per_page > 0;
    for (int i = 0; i < (run.shares_last ? frames_.own_pages() : frames_.pages); ++i)
      run.pages.push_back(layout().history(head, frames_.page_of(index) + i));
    if (run.shares_last) {
      run.pages.push_back(layout().history(head, frames_.shared_page_of(index)));
      run.last_row = frames_.shared_row_of(index);
    }
    out.push_back(run);
  }
  return out;
}

void DeviceCache::save(std::ostream& out) const {
  check(cudaStreamSynchronize(stream()), "cache");
  write_state_header(out, options_, policy_state());
  PageStore pages({}, options_.dtype, options_.head_dim);
  KvPage page = pages.take();
  HostedPage from(layout());
  const auto place = [&](int32_t number) {
    return layout().store + static_cast<size_t>(number) * from.size();
  };
  const auto dim = static_cast<size_t>(options_.head_dim);
  std::vector<float> key(dim), value(dim);
  for (int head = 0; head < layout().num_heads; ++head) {
    const std::vector<KeyRun> all = runs(head);
    int64_t count = 0;
    for (const KeyRun& run : all) count += (run.keys + kPageTokens - 1) / kPageTokens;
    write_int(out, count);
    for (const KeyRun& run : all) {
      for (int64_t i = 0; i < run.keys; ++i) {
        const int row = run.row_of(i);
        const int64_t slot = i % kPageTokens;
        if (i % kPageKeys == 0)
          check(cudaMemcpy(from.data(), place(run.page_of(i)), from.size(), cudaMemcpyDeviceToHost),
                "cache");
        if (slot == 0) {
          clear_page(page, options_.dtype, options_.head_dim);
          page.num_keys = 0;
          page.has_bias = false;
        }
        from.read(false, row, key.data());
        from.read(true, row, value.data());
        // Weighted values are rounded: what they were is known of groups.
        if (!run.values.empty())
          std::copy_n(run.values.begin() + i * options_.head_dim, dim, value.begin());
        const float weight = from.weight(row);
        write_token(page, options_.dtype, options_.head_dim, slot, key.data(), value.data(),
                    bias_of(weight));
        if (slot + 1 == kPageTokens || i + 1 == run.keys) write_state_page(out, page, options_);
      }
    }
  }
  write_policy(out);
  if (!out) throw Error("cache state: expected to write it, found a failing stream");
}

void DeviceCache::load(std::istream& in) {
  reset();
  try {
    const std::vector<int64_t> state = read_state_header(in, options_);
    PageStore store({}, options_.dtype, options_.head_dim);
    std::vector<PageList> heads(static_cast<size_t>(options_.num_heads));
    for (PageList& list : heads) {
      // A claimed count is believed one page at a time: a short stream ends the loop.
      for (int64_t left = read_int(in); left > 0; --left) {
        list.push_back(store.take());
        read_state_page(in, list.back(), options_);
      }
    }
    std::vector<int64_t> keys;
    for (const PageList& list : heads) {
      keys.push_back(0);
      for (const KvPage& page : list) keys.back() += page.num_keys;
    }
    const auto refuse = [] {
      throw Error(ErrorKind::kInput, "cache state: expected this policy's state, found another");
    };
    if (!read_policy(in, state, keys)) refuse();
    HostedPage to(layout());
    const auto place = [&](int32_t number) {
      return layout().store + static_cast<size_t>(number) * to.size();
    };
    const int first_shared = frames_.history_pages() - frames_.shared_pages(frames_.ring);
    for (int head = 0; head < layout().num_heads; ++head) {
      for (int page = first_shared; page < frames_.history_pages(); ++page)
        check(cudaMemset(place(layout().history(head, page)), 0, to.size()), "cache");
    }
    const auto dim = static_cast<size_t>(options_.head_dim);
    std::vector<float> key(dim), value(dim);
    for (int head = 0; head < layout().num_heads; ++head) {
      const PageList& list = heads[static_cast<size_t>(head)];
      size_t page = 0;
      for (const KeyRun& run : runs(head)) {
        for (int64_t i = 0; i < run.keys; ++i) {
          const int row = run.row_of(i);
          const int64_t slot = i % kPageTokens;
          if (run.is_shared(i) && i % kPageKeys == 0)
            check(cudaMemcpy(to.data(), place(run.page_of(i)), to.size(), cudaMemcpyDeviceToHost),
                  "cache");
          if (page == list.size() || slot >= list[page].num_keys) refuse();
          const KvPage& from = list[page];
          read_token(from, options_.dtype, options_.head_dim, slot, key.data(), value.data());
          const float weight = weight_of(from.bias[slot]);
          for (float& x : value) x *= weight;
          to.write(false, row, key.data());
          to.write(true, row, value.data());
          to.weight(row) = weight;
          if (slot + 1 == kPageTokens || i + 1 == run.keys) ++page;
          if (i % kPageKeys + 1 < kPageKeys && i + 1 < run.keys) continue;
          std::fill(value.begin(), value.end(), 0.0F);
          for (int unused = row + 1; unused < kPageKeys; ++unused) {
            if (run.is_shared(i) && to.weight(unused) > 0) continue;
            to.write(false, unused, key.data());
            to.write(true, unused, value.data());
            to.weight(unused) = 0;
          }
          copy_to_device(reinterpret_cast<const unsigned char*>(to.data()), to.size(),
                         place(run.page_of(i)));
        }
      }
      if (page != list.size()) refuse();
    }
    summarise_all();
    finish(0);
    check(cudaStreamSynchronize(stream()), "cache");
  } catch (...) {
    reset();
    throw;
  }
}

}  // namespace longtake::cuda
