#include "pipeline/comparison.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "metrics/median.h"
#include "pipeline/background.h"
#include "pipeline/scenario_run.h"

namespace longtake {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void add(std::vector<Mean>& sum, const std::vector<Mean>& part) {
  for (size_t i = 0; i < part.size(); ++i) sum[i].add(part[i]);
}

void add(std::vector<AttentionScore>& sum, const std::vector<AttentionScore>& part) {
  for (size_t i = 0; i < part.size(); ++i) sum[i].add(part[i]);
}

// What one scenario measured joins the others; medians apart.
void add(MethodResult& sum, const MethodResult& part) {
  for (Mean MethodResult::*mean :
       {&MethodResult::lockstep_psnr, &MethodResult::lockstep_ssim, &MethodResult::lockstep_l2,
        &MethodResult::psnr, &MethodResult::ssim, &MethodResult::early_psnr,
        &MethodResult::seen_psnr, &MethodResult::return_psnr, &MethodResult::sharpness,
        &MethodResult::density, &MethodResult::cache_bytes, &MethodResult::cache_entries,
        &MethodResult::cache_growth})
    (sum.*mean).add(part.*mean);
  for (std::vector<Mean> FrameSeries::*series :
       {&FrameSeries::ms, &FrameSeries::cache_bytes, &FrameSeries::merged_keys, &FrameSeries::psnr,
        &FrameSeries::lockstep_psnr})
    add(sum.series.*series, part.series.*series);
  add(sum.layers, part.layers);
  add(sum.prompt_layers, part.prompt_layers);
  sum.merged_keys += part.merged_keys;
  sum.evicted_keys += part.evicted_keys;
  if (sum.video.empty()) sum.video = part.video;
}

// All scenarios' plays, shared out among workers.
class Comparison {
 public:
  Comparison(const Context& ctx, const world::Model& model, const std::vector<Scenario>& scenarios,
             const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
             const std::function<bool()>& stopped, const ProgressHook& progress)
      : methods_(methods),
        options_(options),
        stopped_(stopped),
        progress_(progress),
        groups_(lockstep_groups(methods)),
        background_(ctx.device().kind == DeviceKind::kCpu ? 0 : ctx.threads()) {
    for (size_t s = 0; s < scenarios.size(); ++s) {
      const Scenario& scenario = scenarios[s];
      const std::string label =
          str("scenario ", s + 1, " of ", scenarios.size(), " (", scenario.name, "): ");
      runs_.emplace_back(
          model, scenario, methods, options, s == 0,
          [this, label, &scenario](const std::string& what, int64_t frame) {
            next(str(label, what), frame, scenario.num_frames());
          },
          background_);
    }
    const size_t plays = options.free_running ? methods.size() : 1;
    for (size_t s = 0; s < scenarios.size(); ++s) {
      tasks_.push_back({s, 0, nullptr});
      for (size_t g = 0; options.lockstep && g < groups_.size(); ++g)
        tasks_.push_back({s, 0, &groups_[g]});
      for (size_t m = 1; m < plays; ++m) tasks_.push_back({s, m, nullptr});
    }
    left_.assign(scenarios.size(), static_cast<int64_t>(tasks_.size() / scenarios.size()));
    // Side by side the longest come first: dense, which lock step needs, and the lock step of all
    // that share its history.
    const auto rank = [](const Task& task) {
      return task.is_dense() ? 0 : task.group != nullptr ? 1 : 2;
    };
    if (options.jobs > 1)
      std::stable_sort(tasks_.begin(), tasks_.end(),
                       [&](const Task& a, const Task& b) { return rank(a) < rank(b); });
  }

  void run(Context& ctx) {
    if (options_.jobs == 1) {
      work(ctx);
    } else {
      std::vector<std::thread> workers;
      for (int i = 0; i < options_.jobs; ++i)
        workers.emplace_back([this, &ctx] {
          // Made here: OpenMP's number of threads belongs to the calling thread.
          Context own(ctx.device(), ctx.threads());
          work(own);
        });
      for (std::thread& worker : workers) worker.join();
    }
    background_.finish();
    if (failure_) std::rethrow_exception(failure_);
  }

  // Of what was played so far.
  void collect(ComparisonResult& result) const {
    for (size_t s = 0; s < runs_.size(); ++s) {
      const std::vector<MethodResult> rows = runs_[s].rows();
      for (size_t m = 0; m < methods_.size(); ++m) {
        const MethodResult& row = rows[m];
        add(result.methods[m], row);
        result.methods[m].scenarios.push_back({row.lockstep_psnr.value(), row.early_psnr.value(),
                                               row.psnr.value(), row.seen_psnr.value(),
                                               row.return_psnr.value(), row.sharpness.value()});
      }
      if (left_[s] == 0) ++result.num_scenarios;
      result.judged_s += runs_[s].judged_s();
    }
    result.free_s = free_s_;
    result.lockstep_s = lockstep_s_;
    for (size_t m = 0; m < methods_.size(); ++m) take_medians(m, result.methods[m]);
  }

 private:
  struct Task {
    size_t scenario, method;           // that plays freely
    const std::vector<size_t>* group;  // or that are in lock step; null: none
    enum class State : uint8_t { kWaits, kRuns, kDone } state = State::kWaits;

    bool is_dense() const { return group == nullptr && method == 0; }
  };

  void work(Context& ctx) {
    for (Task* task; (task = take()) != nullptr;) {
      ScenarioRun& run = runs_[task->scenario];
      const auto start = std::chrono::steady_clock::now();
      try {
        if (task->group != nullptr)
          run.play_in_lockstep(ctx, *task->group);
        else
          run.play(ctx, task->method);
      } catch (const Stopped&) {
        give_up(nullptr);
        return;
      } catch (...) {
        give_up(std::current_exception());
        return;
      }
      finish(*task, seconds_since(start));
    }
  }

  // The next task that can begin, or nullptr when there will be none.
  Task* take() {
    std::unique_lock lock(mutex_);
    for (;;) {
      bool more = false;
      for (Task& task : tasks_) {
        if (gave_up_ || task.state != Task::State::kWaits) continue;
        more = true;
        if (task.group != nullptr && !has_dense(task.scenario)) continue;
        task.state = Task::State::kRuns;
        return &task;
      }
      if (!more) return nullptr;
      changed_.wait(lock);
    }
  }

  bool has_dense(size_t scenario) const {
    return std::any_of(tasks_.begin(), tasks_.end(), [&](const Task& task) {
      return task.scenario == scenario && task.is_dense() && task.state == Task::State::kDone;
    });
  }

  void finish(Task& task, double seconds) {
    const std::lock_guard lock(mutex_);
    task.state = Task::State::kDone;
    (task.group != nullptr ? lockstep_s_ : free_s_) += seconds;
    if (--left_[task.scenario] == 0) runs_[task.scenario].release();
    changed_.notify_all();
  }

  void give_up(std::exception_ptr failure) {
    const std::lock_guard lock(mutex_);
    gave_up_ = true;
    if (!failure_) failure_ = failure;
    changed_.notify_all();
  }

  // Before every frame of every play.
  void next(const std::string& what, int64_t frame, int64_t num_frames) {
    const std::lock_guard lock(mutex_);
    if (gave_up_ || stopped_()) throw Stopped();
    if (frame % 16 == 0) progress_(str(what, ", frame ", frame, " of ", num_frames));
  }

  void take_medians(size_t method, MethodResult& row) const {
    // Of the chunks in a range that may differ from scenario to scenario.
    const auto median = [&](size_t of, const auto& part, const auto& begin_end) {
      std::vector<double> values;
      for (const ScenarioRun& run : runs_) {
        const auto& chunks = run.chunks(of);
        const auto [begin, end] = begin_end(run);
        for (size_t i = begin; i < std::min(end, chunks.size()); ++i)
          values.push_back(part(chunks[i]));
      }
      return longtake::median(std::move(values));
    };
    using Range = std::pair<size_t, size_t>;
    const auto last_quarter = [](size_t of) {
      return [of](const ScenarioRun& run) {
        const size_t made = run.chunks(of).size();
        return Range{made - std::min(made, std::max<size_t>(1, made / 4)), made};
      };
    };
    const auto own = last_quarter(method), like_dense = last_quarter(0);
    const auto total = [](const ChunkStats& c) { return c.total_ms(); };
    row.chunk_ms = median(method, total, own);
    row.denoise_ms = median(
        method, [](const ChunkStats& c) { return c.denoise_ms; }, own);
    row.select_ms = median(
        method, [](const ChunkStats& c) { return c.select_ms; }, own);
    row.clean_ms = median(
        method, [](const ChunkStats& c) { return c.clean_ms; }, own);
    row.commit_ms = median(
        method, [](const ChunkStats& c) { return c.commit_ms; }, own);
    row.decode_ms = median(
        method, [](const ChunkStats& c) { return c.decode_ms; }, own);
    row.early_ms = median(method, total, [](const ScenarioRun& run) {
      const int64_t begin = kEarlyTime - kEarlyTimeWidth / 2 - run.num_primed();
      return begin < 0
                 ? Range{0, 0}
                 : Range{static_cast<size_t>(begin), static_cast<size_t>(begin + kEarlyTimeWidth)};
    });
    row.speed_up = median(0, total, like_dense) / median(method, total, like_dense);
  }

  const std::vector<NamedMethod>& methods_;
  const ComparisonOptions& options_;
  const std::function<bool()>& stopped_;
  const ProgressHook& progress_;
  const std::vector<std::vector<size_t>> groups_;
  std::deque<ScenarioRun> runs_;
  std::mutex mutex_;  // of everything below, and of the hooks
  std::condition_variable changed_;
  std::vector<Task> tasks_;
  std::vector<int64_t> left_;  // tasks of each scenario that are not done
  bool gave_up_ = false;
  std::exception_ptr failure_;
  double free_s_ = 0, lockstep_s_ = 0;
  Background background_;  // its jobs know all of the above
};

}  // namespace

double Mean::value() const {
  return count_ > 0 ? sum_ / static_cast<double>(count_) : std::numeric_limits<double>::quiet_NaN();
}

ComparisonResult compare(Context& ctx, const world::Model& model,
                         const std::vector<Scenario>& scenarios,
                         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
                         const std::function<bool()>& stopped, const ProgressHook& progress) {
  LONGTAKE_CHECK(!scenarios.empty() && !methods.empty() && options.jobs > 0);
  LONGTAKE_CHECK(methods.front().method.memory.memory == "full");
  ComparisonResult result;
  result.model = model.folder;
  result.dtype = name_of(model.compute);
  result.device = ctx.device().to_string();
  result.threads = ctx.threads();
  result.jobs = options.jobs;
  for (const Scenario& scenario : scenarios) {
    result.num_frames = std::max(result.num_frames, scenario.num_frames());
    result.num_primed = scenario.num_primed;
    result.scenarios.push_back(scenario.name);
  }
  for (const NamedMethod& named : methods)
    result.methods.push_back(empty_row(named, model.config.transformer, result.num_frames));
  const auto start = std::chrono::steady_clock::now();
  LONGTAKE_CHECK(options.jobs == 1 || ctx.device().kind == DeviceKind::kCpu);
  Comparison comparison(ctx, model, scenarios, methods, options, stopped, progress);
  comparison.run(ctx);
  comparison.collect(result);
  // Of a GPU's parts only those between marks of the clock are known.
  for (MethodResult& row : result.methods) {
    if (ctx.device().kind != DeviceKind::kCpu)
      row.select_ms = row.commit_ms = std::numeric_limits<double>::quiet_NaN();
  }
  result.seconds = seconds_since(start);
  result.peak_rss_bytes = peak_rss_bytes();
  return result;
}

}  // namespace longtake
