// Checkpoint files, right and hostile, with the verdict that a correct reader gives.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "golden_support.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "models/wan/checkpoint.h"

namespace longtake {
namespace {

using namespace testing_support;

class GoldenLoader : public GoldenTest {};

nlohmann::json read_index() {
  const std::string path = golden_path("loader/index.json");
  return parse_json(MappedFile(path).bytes(), path, {1 << 20, 8});
}

TEST_F(GoldenLoader, EveryVerdictIsRight) {
  int loaded = 0;
  int refused = 0;
  const auto index = read_index();
  for (const auto& entry : index.at("cases")) {
    const std::string name = entry.at("file");
    const std::string expected = entry.at("expect");
    std::string error;
    try {
      const Checkpoint file(golden_path("loader/" + name));
      for (const StoredTensor& stored : file.tensors())
        read_tensor(stored, Tensor(Device{}, stored.dtype, stored.shape));
    } catch (const Error& caught) {
      error = caught.what();
      EXPECT_EQ(caught.kind(), ErrorKind::kInput) << name << ": " << error;
      EXPECT_EQ(error.find('\n'), std::string::npos) << name << ": " << error;
      EXPECT_LT(error.size(), 600U) << name;
    }
    ++(error.empty() ? loaded : refused);
    if (expected != "either") {
      EXPECT_EQ(error.empty(), expected == "load") << name << ": " << error;
    }
  }
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, 0);
}

// The tensor that "file::name" means; names of files marked "strip" are those after their wrappers
// are stripped, "group/name".
Tensor read_case(const std::string& file, std::string name, bool strip) {
  const std::string path = golden_path("loader/" + file);
  if (!strip) return read_golden(Checkpoint(path), name);
  std::string group;
  if (const size_t slash = name.find('/'); slash != std::string::npos) {
    group = name.substr(0, slash);
    name.erase(0, slash + 1);
  }
  return read_golden(wan::open_generator(path, group), name);
}

TEST_F(GoldenLoader, ValuesAreExact) {
  const auto index = read_index();
  const Checkpoint expected(golden_path("loader/expected.safetensors"));
  int compared = 0;
  for (const auto& [key, stored_name] : index.at("expected_names").items()) {
    const size_t split = key.find("::");
    const std::string file = key.substr(0, split);
    const auto is_file = [&](const auto& entry) { return entry.at("file") == file; };
    const auto& cases = index.at("cases");
    const auto entry = std::find_if(cases.begin(), cases.end(), is_file);
    ASSERT_NE(entry, cases.end()) << file;
    const Tensor want = read_golden(expected, stored_name);
    Tensor found;
    try {
      found = read_case(file, key.substr(split + 2), entry->value("strip", false));
    } catch (const Error& error) {
      EXPECT_EQ(entry->at("expect"), "either") << key << ": " << error.what();
      continue;
    }
    EXPECT_EQ(found.dtype(), want.dtype()) << key;
    ASSERT_EQ(found.shape().to_string(), want.shape().to_string()) << key;
    EXPECT_TRUE(want.empty() ||
                std::memcmp(found.view().raw(), want.view().raw(), want.bytes()) == 0)
        << key;
    ++compared;
  }
  EXPECT_GT(compared, 0);
}

}  // namespace
}  // namespace longtake
