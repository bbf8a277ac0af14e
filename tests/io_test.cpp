// Parsers of files nobody vouches for: what is right is read, what is wrong is named.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "io/checkpoint.h"
#include "io/json.h"
#include "io/pickle.h"
#include "io/safetensors.h"
#include "io/tokenizer.h"
#include "io/vocabulary.h"
#include "io/zip.h"
#include "models/wan/checkpoint.h"
#include "models/world/config.h"
#include "models/world/model.h"
#include "nn/weight_table.h"
#include "runtime_support.h"

namespace longtake {
namespace {

using namespace testing_support;

// The message of the Error (kInput) that `parse` must throw.
template <typename Parse>
std::string input_error(const Parse& parse) {
  try {
    parse();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInput) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos)
        << "one line: " << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return {};
}

std::string safetensors_error(const std::string& file) {
  return input_error([&] { parse_safetensors(bytes_of(file), "f"); });
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

constexpr const char* kTwoFloats = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

std::string aligned(std::string header) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return header;
}

TEST(Safetensors, ReadsTensorsAndMetadata) {
  const std::string header = aligned(
      R"({"__metadata__":{"k":"v"},"b":{"dtype":"I8","shape":[3],"data_offsets":[8,11]},)"
      R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})");
  const auto index =
      parse_safetensors(bytes_of(safetensors_text(header, std::string(11, 'x'))), "f");
  ASSERT_EQ(index.tensors.size(), 3U);
  EXPECT_EQ(index.metadata.at("k"), "v");
  const TensorInfo* a = index.find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->shape, (Shape{1, 2}));
  EXPECT_EQ(a->begin, 8 + header.size());
  EXPECT_EQ(index.find("b")->dtype, DType::kI8);
  EXPECT_EQ(index.find("c"), nullptr);
}

TEST(Safetensors, WritesWhatItReads) {
  const ScratchFolder scratch;
  Tensor floats(Device{}, DType::kF32, {2, 3});
  for (int i = 0; i < 6; ++i) floats.data<float>()[i] = static_cast<float>(i);
  Tensor bytes = Tensor::zeros(Device{}, DType::kU8, {5});
  const NamedView tensors[] = {{"bytes", bytes}, {"floats", floats}};
  write_safetensors(scratch / "f", tensors, {{"quote\"", "line\nbreak"}});
  const SafetensorsFile file(scratch / "f");
  EXPECT_EQ(file.index().metadata.at("quote\""), "line\nbreak");
  const View read = file.view(*file.index().find("floats"));
  EXPECT_EQ(read.shape(), (Shape{2, 3}));
  EXPECT_EQ(read.data<float>()[5], 5.0F);
  EXPECT_FALSE(std::filesystem::exists(scratch / "f.part"));
}

TEST(Safetensors, RefusesBadHeaders) {
  EXPECT_HAS(safetensors_error("short"), "at least 8 bytes");
  std::string huge = safetensors_text("{}", "");
  huge[7] = 0x10;  // a header of 2^60 bytes
  EXPECT_HAS(safetensors_error(huge), "truncated");
  EXPECT_HAS(safetensors_error(safetensors_text("{\"a\":", "")), "valid JSON");
  EXPECT_HAS(safetensors_error(safetensors_text("[1]", "")), "JSON object");
  EXPECT_HAS(safetensors_error(safetensors_text("[[[[[[[[1]]]]]]]]", "")), "levels");
  EXPECT_HAS(safetensors_error(safetensors_text("{\"a\":3}", "")), "object");
  EXPECT_HAS(safetensors_error(safetensors_text("{\"__metadata__\":{\"k\":1}}", "")), "string");
  EXPECT_HAS(
      safetensors_error(safetensors_text(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
                                         R"("a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
                                         "")),
      "twice");
}

TEST(Safetensors, RefusesBadTensors) {
  const auto error = [](const std::string& entry, size_t data_bytes) {
    return safetensors_error(
        safetensors_text(aligned("{\"a\":{" + entry + "}}"), std::string(data_bytes, '\0')));
  };
  EXPECT_HAS(error(R"("dtype":"F13","shape":[2],"data_offsets":[0,8])", 8), "F13");
  EXPECT_HAS(error(R"("dtype":7,"shape":[2],"data_offsets":[0,8])", 8), "dtype");
  EXPECT_HAS(error(R"("shape":[2],"data_offsets":[0,8])", 8), "dtype");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2])", 8), "data_offsets");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])", 8),
             "axes");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])", 8), "fits");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])", 8), "fits");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])", 0),
             "fits");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,0])", 0),
             "fits");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", 8), "expected 12 bytes");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", 8), "rising");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 4), "truncated");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 12), "4 more bytes");
  EXPECT_HAS(error(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])", 12), "hole");
}

TEST(Safetensors, RefusesAViewOfMisalignedData) {
  const ScratchFolder scratch;
  // The header's length decides where the data lies: 1 byte off is misaligned.
  write_text(scratch / "f", safetensors_text(aligned(kTwoFloats) + " ", std::string(8, '\0')));
  const SafetensorsFile file(scratch / "f");
  EXPECT_HAS(input_error([&] { file.view(file.index().tensors[0]); }), "aligned");
}

TEST(Safetensors, RefusesOverlap) {
  const std::string header = aligned(
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})");
  EXPECT_HAS(safetensors_error(safetensors_text(header, std::string(6, '\0'))), "overlaps");
}

TEST(Safetensors, EveryPrefixOfAFileIsRefused) {
  const std::string file = safetensors_text(aligned(kTwoFloats), std::string(8, '\0'));
  EXPECT_NO_THROW(parse_safetensors(bytes_of(file), "f"));
  for (size_t length = 0; length < file.size(); ++length) safetensors_error(file.substr(0, length));
}

// Written by torch.save; the fuzz target's corpus.
const std::string kTorchFiles = "fuzz/corpus/torch_file/";

std::vector<float> values_of(const Checkpoint& file, const std::string& name) {
  const StoredTensor* stored = file.find(name);
  EXPECT_NE(stored, nullptr) << name;
  if (stored == nullptr) return {};
  const Tensor out(Device{}, DType::kF32, stored->shape);
  read_tensor(*stored, out);
  return {out.data<float>(), out.data<float>() + out.numel()};
}

TEST(Checkpoint, ReadsViewsOfSharedStorageInAnyType) {
  const Checkpoint file(kTorchFiles + "views");
  EXPECT_EQ(file.format(), "PyTorch checkpoint");
  EXPECT_EQ(values_of(file, "plain")[11], 11.0F);
  EXPECT_EQ(file.find("turned")->shape, (Shape{4, 3}));
  EXPECT_FALSE(file.find("turned")->is_dense());
  EXPECT_EQ(values_of(file, "turned")[1], 4.0F);
  EXPECT_EQ(values_of(file, "tail"), (std::vector<float>{10, 11}));
  EXPECT_EQ(values_of(file, "wide"), std::vector<float>(6, 1.0F));
  EXPECT_EQ(values_of(file, "half"), (std::vector<float>{0.5F, -2.0F}));
  EXPECT_EQ(values_of(file, "brain"), (std::vector<float>{1.5F}));
  const StoredTensor* count = file.find("count");
  ASSERT_NE(count, nullptr);
  EXPECT_EQ(count->dtype, DType::kI64);
  EXPECT_EQ(count->shape.rank(), 0);
}

TEST(Checkpoint, GroupsAreTheTopLevelKeysThatHoldTensors) {
  Checkpoint file(kTorchFiles + "training");
  EXPECT_EQ(file.groups(), (std::set<std::string>{"", "generator", "generator_ema"}));
  file.keep_group("generator");
  EXPECT_EQ(values_of(file, "weight"), (std::vector<float>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(values_of(wan::open_generator(kTorchFiles + "training"), "w"), (std::vector<float>{3}));
  EXPECT_EQ(wan::open_generator(kTorchFiles + "training", "generator").tensors().size(), 2U);
  EXPECT_EQ(wan::open_lora(kTorchFiles + "training").tensors().size(), 1U);  // those at the top
}

TEST(Checkpoint, ReadsShardsThatAnIndexNames) {
  const ScratchFolder scratch;
  const Tensor one = Tensor::zeros(Device{}, DType::kF32, {2});
  const NamedView first[] = {{"a", one}};
  const NamedView second[] = {{"b", one}, {"c", one}};
  write_safetensors(scratch / "1.safetensors", first, {});
  write_safetensors(scratch / "2.safetensors", second, {});
  const auto open = [&](const std::string& map) {
    write_text(scratch / "index.json",
               R"({"metadata":{"total_size":24},"weight_map":)" + map + "}");
    return Checkpoint(scratch / "index.json");
  };
  const std::string good = R"({"a":"1.safetensors","b":"2.safetensors","c":"2.safetensors"})";
  EXPECT_EQ(open(good).format(), "safetensors in 2 files");
  EXPECT_NE(open(good).find("c"), nullptr);
  const auto error = [&](const std::string& map) { return input_error([&] { open(map); }); };
  EXPECT_HAS(error(R"({"a":"1.safetensors","b":"2.safetensors"})"), "found c");
  EXPECT_HAS(error(R"({"a":"1.safetensors","z":"1.safetensors"})"), "expected 2 tensors");
  EXPECT_HAS(error(R"({"a":"3.safetensors"})"), "3.safetensors: expected a readable file");
  EXPECT_HAS(error(R"({"a":"../1.safetensors"})"), "expected a file name");
  EXPECT_HAS(error("[1]"), "weight_map");
}

TEST(Checkpoint, SaysWhatIsWrongWithAFileThatIsNone) {
  const ScratchFolder scratch;
  const auto error = [&](const std::string& text) {
    write_text(scratch / "f", text);
    return input_error([&] { Checkpoint(scratch / "f"); });
  };
  EXPECT_HAS(error(""), "at least 8 bytes");
  EXPECT_HAS(error("\x80\x02\x8a\x0a and so on"), "older format");
  const std::string good = read_text(kTorchFiles + "tensor");
  EXPECT_HAS(error(good.substr(0, good.size() - 1)), "truncated");
  EXPECT_EQ(parse_zip(bytes_of(good), "f")[0].name, "tensor/data.pkl");
}

TEST(Pickle, NamesTheFunctionItWillNotCall) {
  const std::string text =
      "\x80\x02"
      "cos\nsystem\n)R.";
  EXPECT_HAS(input_error([&] { parse_pickle(bytes_of(text), {}, "p"); }), "function os system");
  EXPECT_HAS(input_error([] { parse_pickle(bytes_of("K\x01"), {}, "p"); }), "more bytes");
  EXPECT_HAS(input_error([] { parse_pickle(bytes_of("(K\x01."), {}, "p"); }), "one value");
}

TEST(Wan, NamesLoseTheirWrappers) {
  EXPECT_EQ(wan::original_name(
                "model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module.ffn.0.bias"),
            "blocks.3.ffn.0.bias");
  EXPECT_EQ(wan::original_name("blocks.12.attn2.to_out.0.weight"), "blocks.12.cross_attn.o.weight");
  EXPECT_EQ(wan::original_name("blocks.12.attn1.norm_q.weight"),
            "blocks.12.self_attn.norm_q.weight");
  EXPECT_EQ(wan::original_name("blocks.0.scale_shift_table"), "blocks.0.modulation");
  EXPECT_EQ(wan::original_name("scale_shift_table"), "head.modulation");
  EXPECT_EQ(wan::original_name("blocks.0.norm2.weight"), "blocks.0.norm3.weight");
  EXPECT_EQ(wan::original_name("condition_embedder.time_proj.bias"), "time_projection.1.bias");
  EXPECT_EQ(wan::original_name("patch_embedding.weight"), "patch_embedding.weight");
}

TEST(Json, NamesKeyExpectedAndFound) {
  const std::string good = read_text(std::string(kTinyModel) + "/config.json");
  EXPECT_NO_THROW(world::parse_config(bytes_of(good), "c"));
  const auto error_with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    return input_error([&] { world::parse_config(bytes_of(text), "c"); });
  };
  EXPECT_HAS(error_with("\"num_steps\": 2", "\"num_steps\": 0"),
             "c.sampler.num_steps: expected an integer in 1..1000, found 0");
  EXPECT_HAS(error_with("\"num_steps\": 2", "\"num_steps\": 99999999999999999999"), "found");
  EXPECT_HAS(error_with("\"num_steps\"", "\"number\""), "no such key");
  EXPECT_HAS(error_with("\"first_steps\": 3", "\"first_steps\": -1"),
             "c.sampler.first_steps: expected an integer in 0..1000, found -1");
  EXPECT_HAS(error_with("\"first_shift\": 4.0", "\"first_shift\": 0.001"),
             "c: sampler.first_shift: expected 0 or at least 0.01, found 0.001");
  EXPECT_HAS(error_with("longtake-world", "wan"), "\"longtake-world\", found \"wan\"");
  EXPECT_HAS(error_with("\"ode\"", "\"ddpm\""), "ode or renoise");
  EXPECT_HAS(error_with("\"shift\": 2.5", "\"shift\": \"fast\""), "a number");
  EXPECT_HAS(error_with("\"head_dim\": 64", "\"head_dim\": 48"), "num_heads * head_dim");
  EXPECT_HAS(error_with("\"rope_time_pairs\": 8", "\"rope_time_pairs\": 7"), "rotary pairs");
  EXPECT_HAS(error_with("\"latent_height\": 16", "\"latent_height\": 17"),
             "multiples of patch_size");
  EXPECT_HAS(error_with("{", "[{"), "valid JSON");
  EXPECT_HAS(input_error([] { parse_json(bytes_of("{} {}"), "c", {100, 4}); }), "valid JSON");
  EXPECT_HAS(input_error([] {
               parse_json(bytes_of(std::string(101, ' ')), "c", {100, 4});
             }),
             "at most 100");
}

TEST(Json, QuotesTheUnprintable) {
  EXPECT_EQ(printable("a\nb\x7f\xff"), "a\\x0ab\\x7f\\xff");
  EXPECT_LT(printable(std::string(1000, 'x')).size(), 100U);
}

TEST(Vocabulary, SplitsLowersAndMarksTheUnknown) {
  const Vocabulary words("<pad>\n<unk>\n.\n,\nred\ntower\n", "v");
  EXPECT_EQ(words.tokenize("A Red,tower."), (std::vector<int32_t>{1, 4, 3, 5, 2}));
  EXPECT_EQ(words.tokenize("  \n"), (std::vector<int32_t>{Vocabulary::kUnknown}));
  EXPECT_EQ(words.unknown_words("red moon , Moon sun"), (std::vector<std::string>{"moon", "sun"}));
}

TEST(Vocabulary, RefusesBadFiles) {
  EXPECT_HAS(input_error([] { Vocabulary("<pad>\n<unk>\na\na\n", "v"); }), "line 4");
  EXPECT_HAS(input_error([] { Vocabulary("<pad>\n\nb\n", "v"); }), "line 2");
  EXPECT_HAS(input_error([] { Vocabulary("<pad>\n", "v"); }), "at least 2");
}

Tensor floats(const Shape& shape, std::vector<float> values) {
  Tensor out(Device{}, DType::kF32, shape);
  std::copy(values.begin(), values.end(), out.data<float>());
  return out;
}

// The layer's matrix, by feeding it the unit vectors: [in, out], bias added.
std::vector<float> matrix_of(Context& ctx, const LinearWeight& layer) {
  const int64_t in = layer.in_features();
  const Tensor unit = Tensor::zeros(Device{}, DType::kF32, {in, in});
  for (int64_t i = 0; i < in; ++i) unit.data<float>()[i * in + i] = 1;
  const Tensor out(Device{}, DType::kF32, {in, layer.out_features()});
  linear(ctx, unit, layer, Activation::kNone, out);
  return {out.data<float>(), out.data<float>() + out.numel()};
}

TEST(Tokenizer, PromptsAreCleaned) {
  EXPECT_EQ(clean_prompt("  a \t\n b  "), "a b");
  EXPECT_EQ(clean_prompt("fish &amp;amp; chips &lt;b&gt; &#39;x&#39; &#x41;"),
            "fish & chips <b> 'x' A");
  EXPECT_EQ(clean_prompt("a&nbsp;b\xe3\x80\x80"
                         "c"),
            "a b c");
  EXPECT_EQ(clean_prompt("\xe2\x80\x9chi\xe2\x80\x9d \xe2\x80\x98you\xe2\x80\x99"), "\"hi\" 'you'");
  EXPECT_EQ(clean_prompt("&; &unknown; &#0; &#xd800; &#99999999; A&B"),
            "&; &unknown; &#0; &#xd800; &#99999999; A&B");
  EXPECT_EQ(clean_prompt("\xe7\x8c\xab"), "\xe7\x8c\xab");
  EXPECT_EQ(clean_prompt(""), "");
}

TEST(Tokenizer, RefusesFilesThatAreNoModel) {
  EXPECT_HAS(input_error([] { Tokenizer("README.md"); }),
             "README.md: expected a SentencePiece model");
  EXPECT_HAS(input_error([] { Tokenizer("none.model"); }), "No such file");
}

TEST(WeightTable, ReordersReshapesAndMergesLowRankUpdates) {
  const ScratchFolder scratch;
  const Tensor weight = floats({3, 1, 2}, {1, 2, 3, 4, 5, 6});
  const Tensor bias = floats({3}, {10, 20, 30});
  const NamedView tensors[] = {{"a.weight", weight}, {"a.bias", bias}, {"b.weight", weight}};
  write_safetensors(scratch / "w", tensors, {});
  const Tensor down = floats({1, 2}, {1, -1});
  const Tensor up = floats({3, 1}, {1, 0, 2});
  const NamedView pair[] = {{"base_model.model.a.lora_A.weight", down},
                            {"base_model.model.a.lora_B.weight", up}};
  write_safetensors(scratch / "lora", pair, {});
  const Checkpoint file(scratch / "w");
  const Checkpoint lora(scratch / "lora");
  Context ctx;
  std::optional<LinearWeight> a, b;
  WeightTable table(file, &ctx);
  table.merge_lora(lora, 0.5F);
  table.linear("a", 3, 2, DType::kF32, a, {.stored = Shape{3, 1, 2}, .row_order = {2, 0, 1}});
  table.linear("b", 3, 2, DType::kF32, b,
               {.stored = Shape{3, 1, 2}, .row_order = {}, .has_bias = false});
  EXPECT_EQ(table.problems(), std::vector<std::string>());
  // Rows 2, 0, 1 of weight + 0.5 up down, columns first, and of the bias.
  EXPECT_EQ(matrix_of(ctx, *a), (std::vector<float>{36, 11.5, 23, 35, 11.5, 24}));
  EXPECT_EQ(matrix_of(ctx, *b), (std::vector<float>{1, 3, 5, 2, 4, 6}));
}

// Of one dtype or several, with an update of one of them.
TEST(WeightTable, StacksLayersOfOneInput) {
  const ScratchFolder scratch;
  const Tensor weight = floats({2, 2}, {1, 2, 3, 4});
  Tensor bytes(Device{}, DType::kI8, {2, 2});
  for (int64_t i = 0; i < 4; ++i) bytes.data<int8_t>()[i] = static_cast<int8_t>(i - 2);
  const Tensor scale = floats({2}, {10, 100});
  const Tensor bias = floats({2}, {0.5F, 0.25F});
  const NamedView tensors[] = {{"a.weight", weight},      {"a.bias", bias}, {"b.weight", bytes},
                               {"b.weight.scale", scale}, {"b.bias", bias}, {"c.weight", weight},
                               {"c.bias", bias}};
  write_safetensors(scratch / "w", tensors, {});
  const Tensor down = floats({1, 2}, {1, -1});
  const Tensor up = floats({2, 1}, {1, 2});
  const NamedView pair[] = {{"base_model.model.c.lora_A.weight", down},
                            {"base_model.model.c.lora_B.weight", up}};
  write_safetensors(scratch / "lora", pair, {});
  const Checkpoint file(scratch / "w");
  const Checkpoint lora(scratch / "lora");
  Context ctx;
  std::optional<LinearWeight> all, missing;
  WeightTable table(file, &ctx);
  table.merge_lora(lora, 1);
  table.stacked_linear({"a", "b", "c"}, 2, 2, DType::kF32, all);
  EXPECT_EQ(table.problems(), std::vector<std::string>());
  EXPECT_EQ(matrix_of(ctx, *all), (std::vector<float>{1.5, 3.25, -19.5, 0.25, 2.5, 5.25, 2.5, 4.25,
                                                      -9.5, 100.25, 1.5, 2.25}));
  table.stacked_linear({"a", "d"}, 2, 2, DType::kF32, missing);
  EXPECT_FALSE(missing.has_value());
  EXPECT_HAS(table.problems().at(0), "d.weight: expected [2, 2], found no such tensor");
}

TEST(WeightTable, ReportsLowRankUpdatesThatFitNoLayer) {
  const ScratchFolder scratch;
  const Tensor weight = floats({3, 2}, {1, 2, 3, 4, 5, 6});
  const NamedView tensors[] = {{"a.weight", weight}};
  write_safetensors(scratch / "w", tensors, {});
  const NamedView pair[] = {{"base_model.model.a.lora_A.weight", weight},
                            {"base_model.model.c.lora_A.weight", weight}};
  write_safetensors(scratch / "lora", pair, {});
  const Checkpoint file(scratch / "w");
  const Checkpoint lora(scratch / "lora");
  std::optional<LinearWeight> a;
  WeightTable table(file, nullptr);
  table.merge_lora(lora, 1);
  table.linear("a", 3, 2, DType::kF32, a, {.stored = {}, .row_order = {}, .has_bias = false});
  const auto problems = table.problems();
  ASSERT_EQ(problems.size(), 2U);
  EXPECT_HAS(problems[0], "expected floats [rank, 2] and [3, rank], found [3, 2] and none");
  EXPECT_HAS(problems[1], "base_model.model.c.lora_A.weight: expected no such tensor");
}

TEST(WeightTable, ReadsHalfPrecisionAndViews) {
  const Checkpoint file(kTorchFiles + "views");
  Context ctx;
  WeightTable table(file, &ctx);
  Tensor half, turned;
  table.tensor("half", {2}, half);
  table.tensor("turned", {4, 3}, turned);
  EXPECT_EQ(half.data<float>()[1], -2.0F);
  EXPECT_EQ(turned.data<float>()[1], 4.0F);
  EXPECT_EQ(table.problems().size(), 5U);  // the file's other tensors
}

TEST(Model, ReportsEveryTensorThatDiffersInOneMessage) {
  const ScratchFolder scratch;
  const std::string folder = copy_tiny_model(scratch);
  const std::string weights = folder + "/model.safetensors";
  replace_in_file(weights, "decoder.0.bias", "decoder.0.bios");  // one missing and one surplus
  replace_in_file(weights, "text_encoder.final_norm.weight", "text_encoder.final_norm.height");
  const std::string message = input_error([&] {
    Context ctx;
    world::load_model(ctx, folder, DType::kF32);
  });
  EXPECT_HAS(message, "found 4 that differ");
  EXPECT_HAS(message, "autoencoder.decoder.0.bias: expected [32], found no such tensor");
  EXPECT_HAS(message, "autoencoder.decoder.0.bios: expected no such tensor, found f32 [32]");
  EXPECT_HAS(message, "text_encoder.final_norm.weight");
}

TEST(Model, ReportsShapesThatDoNotFitTheConfiguration) {
  const ScratchFolder scratch;
  const std::string folder = copy_tiny_model(scratch);
  replace_in_file(folder + "/config.json", "\"ffn_dim\": 160", "\"ffn_dim\": 161");
  const Checkpoint file(folder + "/model.safetensors");
  const auto problems = world::check_weights(world::read_config(folder), file);
  ASSERT_EQ(problems.size(), 6U);  // two layers: ffn.0.weight, ffn.0.bias, ffn.2.weight
  EXPECT_HAS(problems[0], "expected floating point or i8 [161, 64], found i8 [160, 64]");
}

}  // namespace
}  // namespace longtake
