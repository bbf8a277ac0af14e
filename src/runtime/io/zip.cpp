#include "io/zip.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

// Record layouts are those of PKWARE's APPNOTE 6.3: offsets within a record, sizes in bytes.
constexpr uint32_t kLocalMark = 0x04034b50;
constexpr uint32_t kEntryMark = 0x02014b50;
constexpr uint32_t kEndMark = 0x06054b50;
constexpr uint32_t kEnd64Mark = 0x06064b50;
constexpr uint32_t kLocator64Mark = 0x07064b50;
constexpr size_t kLocalBytes = 30;
constexpr size_t kEntryBytes = 46;
constexpr size_t kEndBytes = 22;
constexpr size_t kEnd64Bytes = 56;
constexpr size_t kLocator64Bytes = 20;
constexpr size_t kMaxComment = 65535;
constexpr uint16_t kExtra64 = 1;
constexpr uint64_t kSaturated32 = 0xffffffff;  // the value is in a Zip64 record
constexpr uint64_t kSaturated16 = 0xffff;

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  throw Error(ErrorKind::kInput, str(args...));
}

// Little-endian numbers of an archive; `offset` must have been checked against the size.
class Archive {
 public:
  Archive(std::span<const std::byte> file, const std::string& what) : file_(file), what_(what) {}

  uint64_t number(uint64_t offset, int bytes) const {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i)
      value |=
          std::to_integer<uint64_t>(file_[static_cast<size_t>(offset) + static_cast<size_t>(i)])
          << (8 * i);
    return value;
  }

  // Fails unless [offset, offset + bytes) lies in the file.
  void expect_range(const char* thing, uint64_t offset, uint64_t bytes) const {
    if (offset > file_.size() || bytes > file_.size() - offset)
      fail(what_, ": expected ", thing, " within the file's ", file_.size(), " bytes, found ",
           bytes, " bytes at offset ", offset, " (truncated download?)");
  }

  void expect_mark(const char* thing, uint64_t offset, uint64_t record_bytes, uint32_t mark) const {
    expect_range(thing, offset, record_bytes);
    if (number(offset, 4) != mark)
      fail(what_, ": expected ", thing, " at offset ", offset, ", found something else");
  }

  std::string text(uint64_t offset, uint64_t bytes) const {
    return {reinterpret_cast<const char*>(file_.data()) + offset, static_cast<size_t>(bytes)};
  }

  std::span<const std::byte> bytes(uint64_t offset, uint64_t count) const {
    return file_.subspan(static_cast<size_t>(offset), static_cast<size_t>(count));
  }

  size_t size() const { return file_.size(); }

  const std::string& what() const { return what_; }

 private:
  std::span<const std::byte> file_;
  const std::string& what_;
};

// The last record of an archive; only a comment may follow it.
uint64_t find_end(const Archive& archive) {
  if (archive.size() >= kEndBytes) {
    const uint64_t last = archive.size() - kEndBytes;
    const uint64_t first = last > kMaxComment ? last - kMaxComment : 0;
    for (uint64_t offset = last + 1; offset-- > first;) {
      if (archive.number(offset, 4) == kEndMark && archive.number(offset + 20, 2) == last - offset)
        return offset;
    }
  }
  fail(archive.what(), ": expected a zip archive's directory at the end of ", archive.size(),
       " bytes, found none (truncated download?)");
}

struct Directory {
  uint64_t count;
  uint64_t bytes;
  uint64_t offset;
};

Directory read_end(const Archive& archive) {
  const uint64_t end = find_end(archive);
  Directory directory{archive.number(end + 10, 2), archive.number(end + 12, 4),
                      archive.number(end + 16, 4)};
  if (directory.count == kSaturated16 || directory.bytes == kSaturated32 ||
      directory.offset == kSaturated32) {
    if (end < kLocator64Bytes) fail(archive.what(), ": expected a Zip64 locator, found none");
    const uint64_t locator = end - kLocator64Bytes;
    archive.expect_mark("a Zip64 locator", locator, kLocator64Bytes, kLocator64Mark);
    const uint64_t end64 = archive.number(locator + 8, 8);
    archive.expect_mark("the Zip64 end record", end64, kEnd64Bytes, kEnd64Mark);
    directory = {archive.number(end64 + 32, 8), archive.number(end64 + 40, 8),
                 archive.number(end64 + 48, 8)};
  }
  archive.expect_range("the directory", directory.offset, directory.bytes);
  return directory;
}

// The values of a directory entry that did not fit its 32-bit fields, in the order of the format.
void read_extra64(const Archive& archive, uint64_t begin, uint64_t end,
                  std::initializer_list<uint64_t*> fields) {
  for (uint64_t at = begin; at + 4 <= end;) {
    const uint64_t id = archive.number(at, 2);
    const uint64_t next = at + 4 + archive.number(at + 2, 2);
    if (next > end) break;
    if (id == kExtra64) {
      uint64_t value = at + 4;
      for (uint64_t* field : fields) {
        if (*field != kSaturated32 || value + 8 > next) continue;
        *field = archive.number(value, 8);
        value += 8;
      }
    }
    at = next;
  }
}

// The entry described at `at`, which is moved behind the description.
ZipEntry read_entry(const Archive& archive, uint64_t directory_end, uint64_t& at) {
  archive.expect_mark("a directory entry", at, kEntryBytes, kEntryMark);
  const uint64_t flags = archive.number(at + 8, 2);
  const uint64_t method = archive.number(at + 10, 2);
  uint64_t packed_bytes = archive.number(at + 20, 4);
  uint64_t bytes = archive.number(at + 24, 4);
  const uint64_t name_bytes = archive.number(at + 28, 2);
  const uint64_t extra_bytes = archive.number(at + 30, 2);
  const uint64_t comment_bytes = archive.number(at + 32, 2);
  uint64_t local = archive.number(at + 42, 4);
  const uint64_t name_at = at + kEntryBytes;
  const uint64_t next = name_at + name_bytes + extra_bytes + comment_bytes;
  if (next > directory_end)
    fail(archive.what(), ": expected the directory entry at offset ", at,
         " to end within the directory, found ", next - directory_end, " bytes more");
  ZipEntry entry;
  entry.name = archive.text(name_at, name_bytes);
  read_extra64(archive, name_at + name_bytes, name_at + name_bytes + extra_bytes,
               {&bytes, &packed_bytes, &local});
  at = next;

  const std::string thing = str("entry \"", printable(entry.name), '"');
  constexpr uint64_t kEncrypted = 1;
  if ((flags & kEncrypted) != 0 || method != 0 || bytes != packed_bytes)
    fail(archive.what(), ": ", thing, ": expected it stored as it is, found it ",
         (flags & kEncrypted) != 0 ? "encrypted" : "compressed");
  archive.expect_mark("an entry's header", local, kLocalBytes, kLocalMark);
  // Only the header knows its own lengths: PyTorch pads it to align the data.
  const uint64_t data =
      local + kLocalBytes + archive.number(local + 26, 2) + archive.number(local + 28, 2);
  archive.expect_range(thing.c_str(), data, bytes);
  entry.bytes = archive.bytes(data, bytes);
  return entry;
}

}  // namespace

bool is_zip(std::span<const std::byte> file) {
  return file.size() >= sizeof kLocalMark &&
         Archive(file, std::string()).number(0, sizeof kLocalMark) == kLocalMark;
}

std::vector<ZipEntry> parse_zip(std::span<const std::byte> file, const std::string& what) {
  const Archive archive(file, what);
  const Directory directory = read_end(archive);
  const uint64_t end = directory.offset + directory.bytes;
  std::vector<ZipEntry> entries;
  std::set<std::string_view> names;
  for (uint64_t at = directory.offset; at < end;) {
    entries.push_back(read_entry(archive, end, at));
  }
  if (entries.size() != directory.count)
    fail(what, ": expected ", directory.count, " directory entries, found ", entries.size());
  for (const ZipEntry& entry : entries) {
    if (!names.insert(entry.name).second)
      fail(what, ": expected every entry once, found \"", printable(entry.name), "\" twice");
  }
  return entries;
}

}  // namespace longtake
