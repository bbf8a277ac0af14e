// The directory of a zip archive, so far as PyTorch's checkpoints need it: entries are stored, not
// compressed, and archives over 4 GiB use Zip64. Nothing is extracted; entries are ranges of the
// file.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longtake {

struct ZipEntry {
  std::string name;  // as the archive spells it; never used as a path
  std::span<const std::byte> bytes;
};

bool is_zip(std::span<const std::byte> file);

// Entries in the directory's order; each lies within the file and has a name of its own. `what`
// names the file in errors. Throws Error (kInput): the first thing wrong, with its offset.
std::vector<ZipEntry> parse_zip(std::span<const std::byte> file, const std::string& what);

}  // namespace longtake
