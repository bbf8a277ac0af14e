#include "kv/device_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "kv/device_cache_base.h"
#include "ops/expect.h"

namespace longtake::cuda {
namespace {

bool is_same(const HistoryReading& a, const HistoryReading& b) {
  return a.sink == b.sink && a.window_frames == b.window_frames &&
         (a.sink != HistoryReading::Sink::kBeforeWindow || a.next_frame == b.next_frame);
}

PageFormat format_of(DType dtype) {
  return dtype == DType::kF32 ? PageFormat::kF32 : PageFormat::kBf16;
}

}  // namespace

DeviceCache::DeviceCache(Context& ctx, const CacheOptions& options, const FrameRing& frames)
    : options_(options),
      frames_(frames),
      counters_(1),
      batch_(options.batch ? options.batch : make_commit_batch(ctx)),
      device_(ctx.device()),
      runtime_(*ctx.cuda()),
      bad_(static_cast<size_t>(2 * options.num_heads)),
      told_(
          Buffer::staging(ctx.device(), sizeof(Told) + static_cast<size_t>(options.num_heads) *
                                                           (sizeof(int32_t) + 2 * sizeof(float)))),
      begin_(static_cast<size_t>(options.num_heads + 1)),
      history_begin_(static_cast<size_t>(options.num_heads + 1)) {
  expect_head_dim(static_cast<int>(options.head_dim), format_of(options.dtype));
  LONGTAKE_CHECK(options.num_heads <= kMostHeads, options.num_heads);
  expect_shape("clock", options.clock, {1});
  expect_dtype("clock", options.clock, DType::kI64);
  std::memset(told_.data(), 0, told_.bytes());
}

PageLayout DeviceCache::layout() const {
  return {format_of(options_.dtype), static_cast<int>(options_.head_dim),
          static_cast<int>(options_.num_heads), room_.work, store_.data()};
}

void DeviceCache::allocate(const Room& room) {
  const size_t page = paged_bytes(static_cast<int>(options_.head_dim), format_of(options_.dtype));
  const auto heads = static_cast<size_t>(options_.num_heads);
  const auto history = [&](const Room& r) { return heads * static_cast<size_t>(r.history); };
  const auto work = [&](const Room& r) { return heads * static_cast<size_t>(r.work); };
  const size_t pages = work(room) + history(room) + static_cast<size_t>(room.pool);
  DeviceArray<unsigned char> store(pages * page);
  if (room_.history > 0) {
    const auto move = [&](size_t from, size_t to, size_t count) {
      check(cudaMemcpyAsync(store.data() + to * page, store_.data() + from * page, count * page,
                            cudaMemcpyDeviceToDevice, stream()),
            "growth of a cache");
    };
    move(work(room_), work(room), history(room_));
    move(work(room_) + history(room_), work(room) + history(room), static_cast<size_t>(room_.pool));
    check(cudaStreamSynchronize(stream()), "cache");
    ++num_growths_;
  }
  std::swap(store_, store);
  room_ = room;
  pages_ = DeviceArray<int32_t>(pages);
  history_pages_ = DeviceArray<int32_t>(pages);
  filled_ = DeviceArray<int32_t>(heads * static_cast<size_t>(room.work + room.history + 1));
  if (options_.page_summaries) {
    summaries_ = std::make_unique<PageSummaries>(static_cast<int64_t>(pages),
                                                 static_cast<int>(options_.head_dim),
                                                 format_of(options_.dtype));
    if (num_growths_ > 0) summarise_all();
  }
  ++shown_.version;
  shown_work_ = -1;
}

void DeviceCache::set_buckets(std::span<const Bucket> buckets) {
  if (!buckets.empty())
    throw Error(ErrorKind::kUsage,
                "buckets of the prompt: expected --device cpu, found a CUDA device");
}

void DeviceCache::check_tokens(const char* what, View k, View v) const {
  expect_rank(what, k, 3);
  expect_shape(what, k, {k.dim(0), options_.num_heads, options_.head_dim});
  expect_shape(what, v, k.shape());
  expect_dtype(what, k, options_.dtype);
  expect_dtype(what, v, options_.dtype);
}

void DeviceCache::check_frames(const char* what, View x, ChunkPosition position) const {
  if (x.dim(0) != position.num_frames * options_.tokens_per_frame)
    throw Error(str(what, ": expected ", position.num_frames, " frames of ",
                    options_.tokens_per_frame, " tokens, found ", x.dim(0), " tokens"));
}

void DeviceCache::set_current(Context&, View k, View v) {
  write_current(k, v, {});
}

void DeviceCache::write_current(View k, View v, const Asked& asked) {
  check_tokens("set_current", k, v);
  join_commits();
  current_pages_ = pages_for(k.dim(0));
  if (current_pages_ > room_.work) allocate({current_pages_, room_.history, room_.pool});
  Fill job;
  job.layout = layout();
  job.asked = asked;
  if (summaries_) job.filled = filled_.data();
  fill(job, k.raw(), v.raw(), k.dim(0), stream());
  summarise(filled_.data(), current_pages_ * job.layout.num_heads);
}

const PageLayout* DeviceCache::work_pages(int64_t tokens) {
  if (options_.dtype != DType::kBF16 || options_.page_summaries || tokens % kPageKeys != 0 ||
      pages_for(tokens) > room_.work)
    return nullptr;
  work_layout_ = layout();
  return &work_layout_;
}

void DeviceCache::read_written(Context&, View, int64_t tokens) {
  join_commits();
  current_pages_ = pages_for(tokens);
}

void DeviceCache::append(FillPlace place, View k, View v, const Asked& asked) {
  join_commits();
  Fill job;
  job.layout = layout();
  job.place = place;
  job.frames = frames_;
  job.counters = counters_.data();
  job.bad = bad_.data();
  job.asked = asked;
  const int count = fill_pages(job, k.dim(0)) * job.layout.num_heads;
  // Many frames at once, as when a history is computed anew, fill more pages than a chunk's.
  if (summaries_ && static_cast<size_t>(count) > filled_.size())
    filled_ = DeviceArray<int32_t>(static_cast<size_t>(count));
  if (summaries_) job.filled = filled_.data();
  fill(job, k.raw(), v.raw(), k.dim(0), stream());
  summarise_later(filled_.data(), count);
}

void DeviceCache::summarise_later(const int32_t* pages, int count) {
  if (summaries_ && count > 0)
    batch_->add(*summaries_, summaries_->job(store_.data(), pages, count));
}

void DeviceCache::summarise(const int32_t* pages, int count) {
  if (summaries_) summaries_->update(store_.data(), pages, count, stream());
}

void DeviceCache::summarise_all() {
  if (!summaries_) return;
  std::vector<int32_t> all(store_.size() / layout().page_bytes());
  std::iota(all.begin(), all.end(), 0);
  const DeviceArray<int32_t> list = on_device(all);
  summarise(list.data(), static_cast<int>(all.size()));
  check(cudaStreamSynchronize(stream()), "cache");
}

Table DeviceCache::table_of(int work_pages, const DeviceArray<int32_t>& begin,
                            const DeviceArray<int32_t>& pages) const {
  Table table;
  table.layout = layout();
  table.work = work_pages;
  table.frames = frames_;
  table.read_frames = reading_.window_frames;
  table.shows_sink = reading_.sink != HistoryReading::Sink::kHidden;
  if (reading_.sink == HistoryReading::Sink::kBeforeWindow) table.moved_sink = moved_sink_;
  table.clock = options_.clock.data<int64_t>();
  table.counters = counters_.data();
  table.begin = begin.data();
  table.pages = pages.data();
  table.pool = table.layout.num_heads * (room_.work + room_.history);
  describe(table);
  return table;
}

void DeviceCache::write_shown() const {
  shown_work_ = current_pages_;
  shown_reading_ = reading_;
  write_table(table_of(current_pages_, begin_, pages_), stream());
}

void DeviceCache::finish(int64_t joins) {
  current_pages_ = 0;
  reading_ = {};
  Table table = table_of(usual_work(), begin_, pages_);
  table.joins = joins;
  table.told = &told();
  table.bad = bad_.data();
  shown_work_ = usual_work();
  shown_reading_ = {};
  batch_->add(table);
  waits_for_ = batch_->round();
  if (joins == 0 || !options_.batch) batch_->run();
}

KvView DeviceCache::view() const {
  if (waits_for_ == batch_->round()) batch_->run();
  const bool works = current_pages_ > 0;
  DevicePages& out = works ? shown_ : history_;
  if (!works) {
    write_table(table_of(0, history_begin_, history_pages_), stream());
    ++history_.version;
  } else if (shown_work_ != current_pages_ || !is_same(shown_reading_, reading_)) {
    write_shown();
  }
  const Table table =
      table_of(current_pages_, works ? begin_ : history_begin_, works ? pages_ : history_pages_);
  out.format = table.layout.format;
  out.head_dim = table.layout.head_dim;
  out.store = table.layout.store;
  out.heads = {table.layout.num_heads, table.begin, table.pages};
  out.max_pages_per_head = current_pages_ + room_.history + table.most_group_pages;
  out.summaries = summaries_.get();
  // Besides the chunk in work: the sink and the newest frame, or the first tokens and the last.
  const int frame = pages_for(options_.tokens_per_frame);
  out.first_pages = current_pages_ + (table.is_ring ? (frames_.sink + 1) * frame : frame);
  out.last_pages = table.is_ring ? 0 : frame + 1;
  return {options_.dtype, options_.head_dim, {}, &out};
}

void DeviceCache::set_reading(Context&, const HistoryReading& reading) {
  if (!reading.is_everything() && frames_.ring == 0)
    throw Error(ErrorKind::kUsage, str("memory: expected window, which keeps frames apart, for a ",
                                       "model that reads some of them, found ", options_.memory));
  join_commits();
  current_pages_ = 0;
  if (is_same(reading_, reading)) return;
  reading_ = reading;
  if (reading.sink != HistoryReading::Sink::kBeforeWindow || frames_.sink == 0) return;
  if (moved_sink_ < 0) {
    moved_sink_ = room_.history;
    allocate({room_.work, room_.history + frames_.sink * frames_.pages, room_.pool});
    std::vector<double> speeds;
    for (int64_t i = 0; i < reading.time_pairs; ++i)
      speeds.push_back(std::pow(reading.time_theta,
                                -static_cast<double>(i) / static_cast<double>(reading.time_pairs)));
    speeds_ = on_device(speeds);
  }
  LONGTAKE_CHECK(static_cast<int64_t>(speeds_.size()) == reading.time_pairs, reading.time_pairs);
  move_sink(table_of(0, begin_, pages_), moved_sink_, static_cast<int>(reading.time_pairs),
            speeds_.data(), stream());
}

void DeviceCache::reset() {
  join_commits();
  current_pages_ = 0;
  reading_ = {};
  check(cudaMemsetAsync(counters_.data(), 0, sizeof(Counters), stream()), "cache");
  check(cudaMemsetAsync(bad_.data(), 0, bad_.size() * sizeof(float), stream()), "cache");
  finish(0);
  check(cudaStreamSynchronize(stream()), "cache");
}

void DeviceCache::expect_finite() const {
  const int64_t heads = options_.num_heads;
  const auto* bad = reinterpret_cast<const float*>(told().entries() + heads);
  for (int64_t i = 0; i < 2 * heads; ++i) {
    if (bad[i] == 0) continue;
    const std::string layer = options_.layer >= 0 ? str("layer ", options_.layer, ", ") : "";
    throw Error(str(layer, i < heads ? "keys" : "values", " of head ", i % heads,
                    ": expected finite numbers, found ", bad[i]));
  }
}

int64_t DeviceCache::entries() const {
  const int32_t* all = told().entries();
  return *std::max_element(all, all + options_.num_heads);
}

int64_t DeviceCache::total_entries() const {
  int64_t sum = 0;
  for (int64_t head = 0; head < options_.num_heads; ++head) sum += told().entries()[head];
  return sum;
}

int64_t DeviceCache::num_history_pages(int64_t head) const {
  write_table(table_of(0, history_begin_, history_pages_), stream());
  check(cudaStreamSynchronize(stream()), "cache");
  const std::vector<int32_t> begin = on_host(history_begin_);
  return begin[static_cast<size_t>(head) + 1] - begin[static_cast<size_t>(head)];
}

size_t DeviceCache::bytes_used() const {
  return static_cast<size_t>(told().pages) * layout().page_bytes();
}

std::vector<int32_t> DeviceCache::frame_members(int64_t held, int64_t ring_frames,
                                                int64_t num_committed) const {
  const int64_t tokens = options_.tokens_per_frame;
  LONGTAKE_CHECK(held * tokens == num_committed, held, " frames, ", num_committed, " keys");
  std::vector<int32_t> out(static_cast<size_t>(num_committed), -1);
  const int64_t sink = std::min<int64_t>(held, frames_.sink);
  const auto show = [&](int64_t frame, int64_t place) {
    const auto first = out.begin() + frame * tokens;
    std::iota(first, first + tokens, static_cast<int32_t>(place * tokens));
  };
  for (int64_t frame = 0; frame < sink; ++frame) show(frame, frame);
  for (int64_t age = 0; age < std::min(held - sink, ring_frames); ++age)
    show(held - 1 - age, sink + age);
  return out;
}

Counters DeviceCache::read_counters() const {
  check(cudaStreamSynchronize(stream()), "cache");
  Counters out;
  check(cudaMemcpy(&out, counters_.data(), sizeof out, cudaMemcpyDeviceToHost), "cache");
  return out;
}

void DeviceCache::write_counters(const Counters& counters) {
  copy_to_device(&counters, 1, counters_.data());
}

std::shared_ptr<CommitBatch> make_device_commit_batch(Context& ctx) {
  return std::make_shared<CommitBatch>(*ctx.cuda());
}

std::unique_ptr<KvCache> make_device_cache(Context& ctx, const CacheOptions& options) {
  if (options.memory == "full") return make_device_full_cache(ctx, options);
  if (options.memory == "window") return make_device_window_cache(ctx, options);
  if (options.memory == "tempcache") return make_device_temp_cache(ctx, options);
  throw Error(ErrorKind::kUsage,
              str("--memory ", options.memory, ": expected --device cpu, found a CUDA device"));
}

}  // namespace longtake::cuda
