// Runs of the binary with a tiny random model of the Wan family, written once for all tests.
#pragma once

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "cli_support.h"
#include "device/context.h"
#include "models/wan/random_model.h"

namespace longtake::testing_support {

class CliModelTest : public CliTest {
 protected:
  // For SetUpTestSuite; size: of RandomModelOptions.
  static void write_model(const std::string& size) {
    folder_ = new ScratchFolder;
    Context ctx({}, 1);
    wan::write_random_model(ctx, model(), {.size = size, .dtype = DType::kF32});
  }

  static void TearDownTestSuite() { delete folder_; }

  static std::string model() { return *folder_ / "model"; }

  // generate in the scratch folder, 48 x 32 pixels.
  Args generate(const Args& extra, const std::string& out = "v.mp4") const {
    Args args = {"generate", "--model", model(), "--size", "48x32",       "--threads",
                 "1",        "--dtype", "f32",   "--out",  scratch_ / out};
    args.insert(args.end(), extra.begin(), extra.end());
    return args;
  }

  // What the run wrote as PNG `index` of the folder `out`.
  std::string picture(const std::string& out, int index) const {
    char name[32];
    std::snprintf(name, sizeof name, "/frame_%06d.png", index);
    return read_text((scratch_ / out) + name);
  }

  void play(const Args& extra, const std::string& out) const {
    const Result result = run(generate(extra, out));
    EXPECT_EQ(result.code, 0) << result.err;
  }

  nlohmann::json stats() const { return nlohmann::json::parse(read_text(scratch_ / "s.json")); }

 private:
  inline static ScratchFolder* folder_ = nullptr;
};

}  // namespace longtake::testing_support
