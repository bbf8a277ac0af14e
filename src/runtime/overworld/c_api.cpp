#include "overworld/c_api.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "overworld/paths.h"
#include "overworld/prompt.h"
#include "overworld/render.h"
#include "overworld/rng.h"

using namespace longtake;
using namespace longtake::overworld;

struct ow_pool {
  std::vector<std::unique_ptr<const Map>> maps;
};

namespace {

constexpr int kMaxMaps = 1 << 16;
constexpr int kMaxThreads = 1024;

thread_local std::string last_error;

// Runs `body` and turns what it throws into last_error and `failure`.
template <typename Result, typename Body>
Result guarded(Result failure, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown failure";
  }
  return failure;
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw Error(ErrorKind::kUsage, "overworld: " + what);
}

// Calls work(i) for every i in [0, count); the first exception is thrown again here.
void share_out(int count, int num_threads, const std::function<void(int)>& work) {
  expect(num_threads >= 1 && num_threads <= kMaxThreads,
         str("expected 1 to ", kMaxThreads, " threads, found ", num_threads));
  std::atomic<int> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&] {
    try {
      for (int i = next++; i < count; i = next++) work(i);
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int k = 1; k < std::min(num_threads, count); ++k) threads.emplace_back(run);
  run();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

const Map& map_of(const ow_pool* pool, int map) {
  expect(pool != nullptr, "expected a pool, found NULL");
  const int count = static_cast<int>(pool->maps.size());
  expect(map >= 0 && map < count, str("expected a map from 0 to ", count - 1, ", found ", map));
  return *pool->maps[static_cast<size_t>(map)];
}

ow_pool* make_pool(int num_maps, int num_threads,
                   const std::function<std::unique_ptr<const Map>(int)>& make) {
  expect(num_maps >= 1 && num_maps <= kMaxMaps,
         str("expected 1 to ", kMaxMaps, " maps, found ", num_maps));
  auto pool = std::make_unique<ow_pool>();
  pool->maps.resize(static_cast<size_t>(num_maps));
  share_out(num_maps, num_threads, [&](int i) { pool->maps[static_cast<size_t>(i)] = make(i); });
  return pool.release();
}

}  // namespace

const char* ow_last_error(void) {
  return last_error.c_str();
}

ow_pool* ow_pool_create(uint64_t first_seed, int num_maps, int num_threads) {
  return guarded<ow_pool*>(nullptr, [&] {
    return make_pool(num_maps, num_threads, [&](int i) {
      const uint64_t seed = first_seed + static_cast<uint64_t>(i);
      return std::make_unique<const Map>(seed, sample_spec(seed));
    });
  });
}

ow_pool* ow_pool_from_prompts(const char* const* prompts, int num, uint64_t first_seed,
                              int num_threads) {
  return guarded<ow_pool*>(nullptr, [&] {
    expect(prompts != nullptr, "expected prompts, found NULL");
    return make_pool(num, num_threads, [&](int i) {
      expect(prompts[i] != nullptr, str("expected a prompt for map ", i, ", found NULL"));
      const uint64_t seed = first_seed + static_cast<uint64_t>(i);
      return std::make_unique<const Map>(seed, parse_prompt(prompts[i], seed));
    });
  });
}

ow_pool* ow_pool_with_themes(const ow_pool* pool, const int32_t* themes, int num_threads) {
  return guarded<ow_pool*>(nullptr, [&] {
    expect(pool != nullptr && themes != nullptr, "expected a pool and themes, found NULL");
    const int count = static_cast<int>(pool->maps.size());
    for (int i = 0; i < count * kNumRegions; ++i) {
      expect(themes[i] >= 0 && themes[i] < kNumThemes,
             str("expected a theme from 0 to ", kNumThemes - 1, ", found ", themes[i]));
    }
    return make_pool(count, num_threads, [&](int i) {
      std::array<Theme, kNumRegions> of_map;
      for (int r = 0; r < kNumRegions; ++r) {
        of_map[static_cast<size_t>(r)] = static_cast<Theme>(themes[i * kNumRegions + r]);
      }
      return std::make_unique<const Map>(map_of(pool, i).with_themes(of_map));
    });
  });
}

void ow_pool_destroy(ow_pool* pool) {
  delete pool;
}

int ow_vocab_size(void) {
  return guarded(-1, [] { return static_cast<int>(vocabulary().size()); });
}

const char* ow_vocab_word(int id) {
  return guarded<const char*>(nullptr, [&] {
    const auto& words = vocabulary();
    expect(id >= 0 && id < static_cast<int>(words.size()),
           str("expected a word from 0 to ", words.size() - 1, ", found ", id));
    return words[static_cast<size_t>(id)].c_str();
  });
}

int ow_tokenize(const char* text, int32_t* ids, int cap) {
  return guarded(-1, [&] {
    expect(text != nullptr && ids != nullptr, "expected text and room for tokens, found NULL");
    const std::vector<int32_t> tokens = tokenize(text);
    expect(static_cast<int64_t>(tokens.size()) <= cap,
           str("expected room for ", tokens.size(), " tokens, found ", cap));
    std::copy(tokens.begin(), tokens.end(), ids);
    return static_cast<int>(tokens.size());
  });
}

int ow_prompt(ow_pool* pool, int map, uint64_t seed, char* buf, int cap) {
  return guarded(-1, [&] {
    const Map& m = map_of(pool, map);
    const std::string text = describe(m.spec(), hash_bits(seed, m.seed()));
    expect(buf != nullptr && static_cast<int64_t>(text.size()) < cap,
           str("expected room for ", text.size() + 1, " bytes, found ", cap));
    std::copy_n(text.c_str(), text.size() + 1, buf);
    return static_cast<int>(text.size());
  });
}

int ow_map_info(ow_pool* pool, int map, int32_t out[57]) {
  return guarded(-1, [&] {
    const Map& m = map_of(pool, map);
    expect(out != nullptr, "expected room for 57 numbers, found NULL");
    for (int i = 0; i < kNumRegions; ++i) {
      const RegionSpec& region = m.spec().regions[static_cast<size_t>(i)];
      out[i] = static_cast<int32_t>(region.theme);
      out[9 + i] = static_cast<int32_t>(region.sea);
      out[18 + i] = static_cast<int32_t>(region.forest);
      out[27 + i] = static_cast<int32_t>(region.landmark);
      out[36 + i] = static_cast<int32_t>(region.color);
      out[45 + i] = region.mentioned ? 1 : 0;
    }
    out[54] = static_cast<int32_t>(m.spec().weather);
    out[55] = m.start().x;
    out[56] = m.start().y;
    return 0;
  });
}

int ow_region_at(ow_pool* pool, int map, int32_t x, int32_t y) {
  return guarded(-1, [&] { return map_of(pool, map).region_at(x, y); });
}

int ow_paths(ow_pool* pool, uint64_t seed, int T, int kind, int anywhere, int32_t* xy,
             uint8_t* actions) {
  return guarded(-1, [&] {
    expect(pool != nullptr && xy != nullptr && actions != nullptr,
           "expected a pool and room for paths, found NULL");
    expect(T >= 1 && T <= kMaxActions, str("expected 1 to ", kMaxActions, " frames, found ", T));
    expect(kind >= 0 && kind < kNumPathKinds,
           str("expected a kind of path from 0 to ", kNumPathKinds - 1, ", found ", kind));
    for (size_t i = 0; i < pool->maps.size(); ++i) {
      const uint64_t path_seed = hash_bits(seed, i);
      const std::vector<Action> path = make_path(static_cast<PathKind>(kind), T, path_seed);
      const Point start = anywhere != 0 ? random_place(path_seed) : pool->maps[i]->start();
      for (const Point& pose : poses_of(start, path)) {
        *xy++ = pose.x;
        *xy++ = pose.y;
      }
      for (const Action action : path) *actions++ = static_cast<uint8_t>(action);
    }
    return 0;
  });
}

int ow_render(ow_pool* pool, int n, const int32_t* map_idx, const int32_t* x, const int32_t* y,
              const int32_t* t, int num_threads, uint8_t* rgb, uint8_t* classes) {
  return guarded(-1, [&] {
    expect(n >= 0, str("expected a number of frames, found ", n));
    expect(map_idx != nullptr && x != nullptr && y != nullptr && t != nullptr && rgb != nullptr,
           "expected frames and room for pixels, found NULL");
    constexpr size_t kPixels = kCameraWidth * kCameraHeight;
    share_out(n, num_threads, [&](int i) {
      const auto k = static_cast<size_t>(i);
      uint8_t* terrain = classes == nullptr ? nullptr : classes + k * kPixels;
      render_frame(map_of(pool, map_idx[k]), {x[k], y[k]}, t[k], rgb + k * kFrameBytes, terrain);
    });
    return 0;
  });
}
