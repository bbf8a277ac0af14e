// The text encoder and the tokenizer against the official code and library.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "golden_support.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "io/tokenizer.h"
#include "models/wan/text_encoder.h"

namespace longtake {
namespace {

using namespace testing_support;

class GoldenText : public GoldenTest {
 protected:
  static std::vector<int32_t> ids(const Checkpoint& golden, const std::string& name,
                                  int64_t count) {
    const Tensor all = read_golden(golden, name);
    return {all.data<int32_t>(), all.data<int32_t>() + count};
  }

  Context ctx_{{}, 2};
};

TEST_F(GoldenText, EncoderF32) {
  const Checkpoint golden(golden_path("t5.safetensors"));
  const auto sizes = nlohmann::json::parse(golden.metadata().at("config"));
  const wan::TextEncoder encoder(ctx_, Checkpoint(golden_path("t5.weights.safetensors")),
                                 DType::kF32);
  EXPECT_EQ(encoder.config().num_heads, sizes.at("heads"));
  EXPECT_EQ(encoder.config().num_layers, sizes.at("layers"));
  const int64_t real = sizes.at("real");
  const auto prompt = ids(golden, "ids", real);
  const Tensor found = encoder.encode(ctx_, prompt, [&](int64_t layer, View x) {
    if (layer != 0) return;
    const Tensor expected = read_golden(golden, "inner.block0.out");
    expect_near("block 0", expected.view().rows(0, real), x, kCallF32);
  });
  expect_near("out", read_golden(golden, "out_unpadded"), found, kCallF32);
  expect_near("prompt_embeds", read_golden(golden, "prompt_embeds"),
              encoder.encode_padded(ctx_, prompt, sizes.at("len")), kCallF32);
  const auto long_prompt = ids(golden, "long.ids", sizes.at("long"));
  expect_near("long", read_golden(golden, "long.out"), encoder.encode(ctx_, long_prompt), kCallF32);
  print_tally("t5");
}

TEST_F(GoldenText, EncoderBF16) {
  if (!bf16_products_supported()) GTEST_SKIP() << "no bf16 products on this machine";
  const Checkpoint golden(golden_path("t5.safetensors"));
  const auto sizes = nlohmann::json::parse(golden.metadata().at("config"));
  const wan::TextEncoder encoder(ctx_, Checkpoint(golden_path("t5.weights.safetensors")),
                                 DType::kBF16);
  const int64_t real = sizes.at("real");
  const StoredTensor* stored = golden.find("out_bf16");
  ASSERT_NE(stored, nullptr);
  const Tensor expected(Device{}, DType::kF32, stored->shape);
  read_tensor(*stored, expected);
  expect_near("out_bf16", expected.view().rows(0, real),
              encoder.encode(ctx_, ids(golden, "ids", real)), {INFINITY, 2.5e-2});
  print_tally("t5, bf16");
}

TEST_F(GoldenText, BucketsAreThoseOfTheFormula) {
  const Checkpoint golden(golden_path("t5.safetensors"));
  const Tensor distance = read_golden(golden, "bucket.rel");
  const Tensor bucket = read_golden(golden, "bucket.id");
  ASSERT_GT(distance.numel(), 0);
  for (int64_t i = 0; i < distance.numel(); ++i)
    EXPECT_EQ(wan::distance_bucket(distance.data<int32_t>()[i]), bucket.data<int32_t>()[i])
        << distance.data<int32_t>()[i];
}

TEST_F(GoldenText, TokensAreThoseOfTheLibrary) {
  const std::string path = golden_path("tiny_unigram.expected.json");
  const auto expected = parse_json(MappedFile(path).bytes(), path, {1 << 20, 8});
  const Tokenizer tokenizer(golden_path("tiny_unigram.spm.model"));
  EXPECT_EQ(tokenizer.vocab_size(), expected.at("vocab"));
  ASSERT_FALSE(expected.at("cases").empty());
  for (const auto& entry : expected.at("cases")) {
    const std::string text = entry.at("text");
    const auto all = entry.at("ids").get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer.encode(text), all) << text;
    // Cut short, the end mark stays.
    const auto cut = tokenizer.encode(text, 3);
    ASSERT_LE(cut.size(), 3U);
    EXPECT_EQ(cut.back(), all.back());
    EXPECT_TRUE(std::equal(cut.begin(), cut.end() - 1, all.begin())) << text;
  }
}

}  // namespace
}  // namespace longtake
