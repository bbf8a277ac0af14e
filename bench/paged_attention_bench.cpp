// Times paged attention on the GPU, dense and by lists, with and without bias, after checking it
// against plain loops in double.
//
//   paged_attention_bench [--json FILE] [--quick] [--only PART OF A NAME]
//
// Prints one line a case: milliseconds (median) of a call, and of a call among 32 in one recorded
// graph, which is how the engine runs; of that TFLOP/s on executed pairs of queries and keys, and
// percent of what a large matrix product of cuBLAS reaches in the same process.
#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include "attention/page_lists.h"
#include "attention/paged_attention.h"
#include "attention/prompt_tokens.h"
#include "base/dtype.h"

namespace {

using namespace longtake;
using namespace longtake::cuda;

// Random normal numbers, never zeros: power, and so the clock, depends on the data.
std::vector<bf16> random_bf16(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> table(1 << 16), out(count);
  for (auto& x : table) x = bf16(normal(random));
  for (auto& x : out) x = table[random() >> 16];
  return out;
}

template <typename Body>
double median_ms(int runs, const Body& body) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < runs + 3; ++i) {
    check(cudaEventRecord(begin, nullptr), "event");
    body();
    check(cudaEventRecord(end, nullptr), "event");
    check(cudaEventSynchronize(end), "timed work");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 3) times.push_back(ms);
  }
  check(cudaEventDestroy(begin), "event");
  check(cudaEventDestroy(end), "event");
  std::nth_element(times.begin(), times.begin() + static_cast<long>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// Of one call among `calls` in a graph; body(stream).
template <typename Body>
double median_ms_in_graph(int runs, int calls, const Body& body) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) body(stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  check(cudaStreamDestroy(stream), "stream");
  const double ms = median_ms(runs, [&] { check(cudaGraphLaunch(executable, nullptr), "graph"); });
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");
  return ms / calls;
}

double matrix_product_tflops() {
  constexpr int kSize = 8192;
  const auto a = on_device(random_bf16(static_cast<size_t>(kSize) * kSize, 1));
  const auto b = on_device(random_bf16(static_cast<size_t>(kSize) * kSize, 2));
  DeviceArray<bf16> c(static_cast<size_t>(kSize) * kSize);
  cublasHandle_t handle;
  if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) throw Error("cuBLAS does not start");
  const float one = 1, zero = 0;
  const double ms = median_ms(20, [&] {
    cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, kSize, kSize, kSize, &one, a.data(), CUDA_R_16BF,
                 kSize, b.data(), CUDA_R_16BF, kSize, &zero, c.data(), CUDA_R_16BF, kSize,
                 CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  });
  cublasDestroy(handle);
  return 2.0 * kSize * kSize * kSize / ms * 1e-9;
}

struct Case {
  const char* name;
  int queries, keys, heads, head_dim;
  bool biased;
  double density;  // 1: dense
  PageFormat format = PageFormat::kBf16;
};

// Relative L2 over a few queries of the tile in each head.
double sampled_error(const Case& c, const std::vector<bf16>& q, const std::vector<bf16>& k,
                     const std::vector<bf16>& v, const std::vector<float>& bias,
                     const std::vector<std::vector<int32_t>>& rows, const std::vector<bf16>& out) {
  std::mt19937 random(11);
  const int tiles = (c.queries + kTileQueries - 1) / kTileQueries;
  const int pages = (c.keys + kPageKeys - 1) / kPageKeys;
  double error = 0, size = 0;
  for (int sample = 0; sample < 16; ++sample) {
    const int head = static_cast<int>(random() % static_cast<unsigned>(c.heads));
    const int i = static_cast<int>(random() % static_cast<unsigned>(c.queries));
    const auto at = [&](int row) {
      return static_cast<size_t>(row * static_cast<int64_t>(c.heads) + head) *
             static_cast<size_t>(c.head_dim);
    };
    const auto& row = rows[rows.size() == static_cast<size_t>(c.heads)
                               ? static_cast<size_t>(head)
                               : static_cast<size_t>(head * tiles + i / kTileQueries)];
    std::vector<double> sum(static_cast<size_t>(c.head_dim));
    double total = 0, most = -1e300;
    std::vector<std::pair<double, int>> terms;
    for (const int32_t listed : row) {
      const int page = listed - head * pages;
      for (int j = page * kPageKeys; j < std::min(c.keys, (page + 1) * kPageKeys); ++j) {
        double dot = 0;
        for (int d = 0; d < c.head_dim; ++d) {
          dot += static_cast<double>(float(q[at(i) + static_cast<size_t>(d)])) *
                 float(k[at(j) + static_cast<size_t>(d)]);
        }
        const double b = c.biased ? bias[static_cast<size_t>(head) * static_cast<size_t>(c.keys) +
                                         static_cast<size_t>(j)]
                                  : 0;
        terms.emplace_back(dot / std::sqrt(c.head_dim) + b, j);
        most = std::max(most, terms.back().first);
      }
    }
    for (const auto& [logit, j] : terms) {
      const double term = std::exp(logit - most);
      total += term;
      for (int d = 0; d < c.head_dim; ++d) {
        sum[static_cast<size_t>(d)] += term * float(v[at(j) + static_cast<size_t>(d)]);
      }
    }
    for (int d = 0; d < c.head_dim; ++d) {
      const double want = sum[static_cast<size_t>(d)] / total;
      const double got = float(out[at(i) + static_cast<size_t>(d)]);
      error += (got - want) * (got - want);
      size += want * want;
    }
  }
  return std::sqrt(error / size);
}

struct Result {
  double ms, graph_ms, tflops, error;
};

Result time_case(const Case& c, AttentionKernel kernel, int runs) {
  const auto elements = [&](int rows) {
    return static_cast<size_t>(rows) * static_cast<size_t>(c.heads * c.head_dim);
  };
  const auto q = random_bf16(elements(c.queries), 3), k = random_bf16(elements(c.keys), 4),
             v = random_bf16(elements(c.keys), 5);
  std::vector<float> bias;
  std::mt19937 random(6);
  if (c.biased) {
    bias.resize(static_cast<size_t>(c.heads) * static_cast<size_t>(c.keys));
    for (auto& b : bias) b = std::log(1.0F + static_cast<float>(random() % 16));
  }
  const int pages = (c.keys + kPageKeys - 1) / kPageKeys;
  const int tiles = (c.queries + kTileQueries - 1) / kTileQueries;
  // Dense rows of a head share its list; sparse ones have a random choice each, in order.
  const bool dense = c.density == 1;
  std::vector<int32_t> place(static_cast<size_t>(c.heads * pages)), offsets = {0}, listed;
  for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int32_t>(i);
  std::vector<std::vector<int32_t>> rows;
  int64_t executed = 0;
  for (int h = 0; h < c.heads; ++h) {
    for (int t = 0; t < tiles; ++t) {
      if (!dense || t == 0) {
        std::vector<int32_t> row;
        for (int p = 0; p < pages; ++p) {
          if (dense || random() < c.density * 4294967296.0) row.push_back(h * pages + p);
        }
        offsets.push_back(offsets.back() + static_cast<int32_t>(row.size()));
        listed.insert(listed.end(), row.begin(), row.end());
        rows.push_back(std::move(row));
      }
      executed += static_cast<int64_t>(rows.back().size()) * kPageKeys *
                  std::min(kTileQueries, c.queries - t * kTileQueries);
    }
  }
  const auto dq = on_device(q), dk = on_device(k), dv = on_device(v);
  const auto dbias = on_device(bias);
  const auto dplace = on_device(place), doffsets = on_device(offsets), dlisted = on_device(listed);
  const DeviceArray<unsigned char> store(place.size() * paged_bytes(c.head_dim, c.format));
  const DeviceArray<bf16> out(q.size());
  pack_pages(dk.data(), dv.data(), dbias.data(), c.keys, c.heads, c.head_dim, c.format,
             dplace.data(), store.data(), nullptr);
  const PageLists lists = {static_cast<int32_t>(rows.size()),
                           dense ? tiles : 1,
                           pages,
                           0,
                           doffsets.data(),
                           dlisted.data()};
  PagedAttention attention(c.head_dim, kernel, c.format);
  const auto scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  const auto run = [&](cudaStream_t stream) {
    attention.run(dq.data(), c.queries, c.heads, store.data(), lists, scale, out.data(), stream);
  };
  run(nullptr);
  check(cudaDeviceSynchronize(), "attention");
  const double error = sampled_error(c, q, k, v, bias, rows, on_host(out));
  const double most = c.format == PageFormat::kFp8 ? 8e-2 : 1e-2;
  if (!(error < most)) {
    throw Error(str(c.name, ": expected a relative L2 error below ", most, ", found ", error));
  }
  const double ms = median_ms(runs, [&] { run(nullptr); });
  const double graph_ms = median_ms_in_graph(runs, ms > .5 ? 4 : 32, run);
  const double flop = 4.0 * static_cast<double>(executed) * c.head_dim;
  return {ms, graph_ms, flop / graph_ms * 1e-9, error};
}

// Milliseconds to choose the pages of every tile at a density, without the attention that follows;
// and those to look at one new chunk's pages.
void time_lists(const Case& c, int runs, std::ofstream& file) {
  const auto elements = [&](int rows) {
    return static_cast<size_t>(rows) * static_cast<size_t>(c.heads * c.head_dim);
  };
  const int pages = (c.keys + kPageKeys - 1) / kPageKeys;
  const int tiles = (c.queries + kTileQueries - 1) / kTileQueries;
  std::vector<int32_t> place(static_cast<size_t>(c.heads * pages)), begin;
  for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int32_t>(i);
  for (int h = 0; h <= c.heads; ++h) begin.push_back(h * pages);
  const auto q = on_device(random_bf16(elements(c.queries), 3)),
             k = on_device(random_bf16(elements(c.keys), 4));
  const auto dplace = on_device(place), dbegin = on_device(begin);
  const DeviceArray<unsigned char> store(place.size() * paged_bytes(c.head_dim));
  pack_pages(k.data(), k.data(), nullptr, c.keys, c.heads, c.head_dim, PageFormat::kBf16,
             dplace.data(), store.data(), nullptr);
  PageSummaries summaries(static_cast<int64_t>(place.size()), c.head_dim);
  PageLister lister(c.heads * tiles, pages, c.head_dim);
  const auto scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  const int chunk_pages = c.heads * tiles;
  const auto summarise = [&](cudaStream_t stream) {
    summaries.update(store.data(), dplace.data(), chunk_pages, stream);
  };
  const double summary_ms = median_ms_in_graph(runs, 32, summarise);
  summaries.update(store.data(), dplace.data(), static_cast<int>(place.size()), nullptr);
  const auto list = [&](cudaStream_t stream) {
    lister.list(q.data(), false, c.queries, {c.heads, dbegin.data(), dplace.data()}, summaries,
                scale, {c.density, 1, tiles}, stream);
  };
  const double ms = median_ms(runs, [&] { list(nullptr); });
  const double graph_ms = median_ms_in_graph(runs, 32, list);
  std::printf("%-26s %-9s %9.4f %9.4f   summaries of one chunk %.4f ms\n", c.name, "lists", ms,
              graph_ms, summary_ms);
  if (file.is_open()) {
    file << ",\n{\"case\": \"" << c.name << "\", \"kernel\": \"page lists\", \"ms\": " << ms
         << ", \"graph_ms\": " << graph_ms << ", \"summary_ms\": " << summary_ms << "}";
  }
}

// Milliseconds to choose a third of a prompt's tokens and to pack them together.
void time_prompt_tokens(const Case& c, int runs, std::ofstream& file) {
  const auto elements = [&](int rows) {
    return static_cast<size_t>(rows) * static_cast<size_t>(c.heads * c.head_dim);
  };
  const int pages = (c.keys + kPageKeys - 1) / kPageKeys;
  std::vector<int32_t> place(static_cast<size_t>(c.heads * pages)), begin;
  for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int32_t>(i);
  for (int h = 0; h <= c.heads; ++h) begin.push_back(h * pages);
  const auto q = on_device(random_bf16(elements(c.queries), 3)),
             k = on_device(random_bf16(elements(c.keys), 4));
  const auto dplace = on_device(place), dbegin = on_device(begin);
  const DeviceArray<unsigned char> store(place.size() * paged_bytes(c.head_dim));
  pack_pages(k.data(), k.data(), nullptr, c.keys, c.heads, c.head_dim, PageFormat::kBf16,
             dplace.data(), store.data(), nullptr);
  DevicePages prompt;
  prompt.head_dim = c.head_dim;
  prompt.store = store.data();
  prompt.heads = {c.heads, dbegin.data(), dplace.data()};
  prompt.max_pages_per_head = pages;
  prompt.num_tokens = c.keys;
  PromptTokens tokens(prompt, (c.keys + 2) / 3, nullptr);
  const auto scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  const auto choose = [&](cudaStream_t stream) {
    tokens.choose(q.data(), c.queries, true, scale, stream);
  };
  const double ms = median_ms(runs, [&] { choose(nullptr); });
  const double graph_ms = median_ms_in_graph(runs, 32, choose);
  std::printf("%-26s %-9s %9.4f %9.4f\n", c.name, "tokens", ms, graph_ms);
  if (file.is_open()) {
    file << ",\n{\"case\": \"" << c.name << "\", \"kernel\": \"prompt tokens\", \"ms\": " << ms
         << ", \"graph_ms\": " << graph_ms << "}";
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* json = nullptr;
  const char* only = "";
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--json") && i + 1 < argc) {
      json = argv[++i];
    } else if (!std::strcmp(argv[i], "--only") && i + 1 < argc) {
      only = argv[++i];
    } else if (!std::strcmp(argv[i], "--quick")) {
      quick = true;
    } else {
      std::fprintf(stderr, "expected --json FILE, --quick or --only PART, found %s\n", argv[i]);
      return 2;
    }
  }
  try {
    constexpr int kChunk = 4680;  // queries of three latent frames of Wan at 480 x 832
    const std::vector<Case> cases = {
        {"dense 21 frames", kChunk, 7 * kChunk, 12, 128, false, 1},
        {"dense 60 frames", kChunk, 20 * kChunk, 12, 128, false, 1},
        {"dense 60 frames, biased", kChunk, 20 * kChunk, 12, 128, true, 1},
        {"lists 0.50", kChunk, 20 * kChunk, 12, 128, true, .5},
        {"lists 0.25", kChunk, 20 * kChunk, 12, 128, true, .25},
        {"lists 0.10", kChunk, 20 * kChunk, 12, 128, true, .1},
        {"lists 0.05", kChunk, 20 * kChunk, 12, 128, true, .05},
        {"8 bits, 60 frames, biased", kChunk, 20 * kChunk, 12, 128, true, 1, PageFormat::kFp8},
        {"8 bits, lists 0.25", kChunk, 20 * kChunk, 12, 128, true, .25, PageFormat::kFp8},
        {"one frame", 1560, 7 * kChunk, 12, 128, true, 1},
        {"prompt", kChunk, 512, 12, 128, false, 1},
        {"world, 100k keys", 128, 100000, 6, 64, true, 1},
        {"world, 256 frames", 128, 256 * 128, 6, 64, true, 1},
        {"world, 4000 keys", 128, 4000, 6, 64, true, 1},
        {"world, 1000 keys", 128, 1000, 6, 64, true, 1},
        {"world, 4000 keys, 0.50", 128, 4000, 6, 64, true, .5},
        {"world, prompt", 128, 120, 6, 64, false, 1},
    };
    const double ceiling = matrix_product_tflops();
    std::printf("cuBLAS bf16 8192^3: %.0f TFLOP/s\n", ceiling);
    std::printf("%-26s %-9s %9s %9s %9s %7s %10s\n", "case", "kernel", "ms", "in graph", "TFLOP/s",
                "%", "error");
    std::ofstream file;
    if (json) {
      file.open(json);
      file << "{\"cublas_tflops\": " << ceiling << ", \"cases\": [";
    }
    const char* separator = "\n";
    for (const Case& c : cases) {
      if (!std::strstr(c.name, only)) continue;
      for (const auto kernel : {AttentionKernel::kBest, AttentionKernel::kPortable}) {
        const bool best = kernel == AttentionKernel::kBest;
        if (!best && (quick || c.density < .25 || c.format == PageFormat::kFp8)) continue;
        const Result r = time_case(c, kernel, quick ? 5 : 20);
        const char* kernel_name = best ? "best" : "portable";
        std::printf("%-26s %-9s %9.4f %9.4f %9.1f %7.1f %10.2e\n", c.name, kernel_name, r.ms,
                    r.graph_ms, r.tflops, 100 * r.tflops / ceiling, r.error);
        std::fflush(stdout);
        file << separator << "{\"case\": \"" << c.name << "\", \"kernel\": \"" << kernel_name
             << "\", \"queries\": " << c.queries << ", \"keys\": " << c.keys
             << ", \"heads\": " << c.heads << ", \"head_dim\": " << c.head_dim
             << ", \"biased\": " << (c.biased ? "true" : "false") << ", \"density\": " << c.density
             << ", \"ms\": " << r.ms << ", \"graph_ms\": " << r.graph_ms
             << ", \"tflops\": " << r.tflops << ", \"relative_l2\": " << r.error << "}";
        separator = ",\n";
      }
    }
    for (const Case& c : cases) {
      if (c.format != PageFormat::kBf16 || !std::strstr(c.name, only)) continue;
      if (c.density < 1) time_lists(c, quick ? 5 : 20, file);
      if (std::strstr(c.name, "prompt")) time_prompt_tokens(c, quick ? 5 : 20, file);
    }
    file << "\n]}\n";
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
