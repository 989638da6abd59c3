#include "loaders/output.h"

#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <set>

#include "loaders/safetensors.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::get_file;
using testing::in_child;
using testing::put_file;
using testing::TempDir;

std::set<std::string> listing(const fs::path& directory) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) names.insert(entry.path().filename().string());
  return names;
}

// Two files, one in a folder, as a model directory has.
void write_outputs(const fs::path& directory, const std::string& tag) {
  fs::create_directory(directory / "sub");
  OutputFile log(directory / "sub/log.txt");
  log.write("first " + tag);
  log.write("second");
  log.close();
  write_safetensors(directory / "model.safetensors", {{"x", testing::random_tensor({31}, DType::kF32, tag.size())}},
                    {{"tag", tag}});
}
void publish(const fs::path& target, bool force, const std::string& tag) {
  OutputDirectory out(target, force);
  write_outputs(out.path(), tag);
  out.commit();
}
// "new", "old" or what is wrong with the directory.
std::string state_of(const fs::path& target) {
  std::string why;
  if (!fs::exists(target)) return "absent";
  if (!is_complete(target, true, &why)) return why;
  return SafetensorsFile(target / "model.safetensors").metadata().at("tag");
}

struct Fault {  // a write fault that is gone with the scope
  explicit Fault(std::function<void(int64_t)> hook) { set_write_fault(std::move(hook)); }
  ~Fault() { set_write_fault({}); }
};

TEST(OutputDirectory, AppearsCompleteOrNotAtAll) {
  const TempDir dir;
  {
    OutputDirectory out(dir / "model", false);
    write_outputs(out.path(), "new");
    EXPECT_FALSE(fs::exists(dir / "model"));
    out.commit();
  }
  EXPECT_EQ(state_of(dir / "model"), "new");
  EXPECT_EQ(listing(dir.path()), std::set<std::string>{"model"});  // no lock, no temporary
  {
    const OutputDirectory out(dir / "other", false);
    write_outputs(out.path(), "new");
  }
  EXPECT_EQ(listing(dir.path()), std::set<std::string>{"model"});  // no commit, no trace
}

TEST(OutputDirectory, ForceReplacesAtCommitAndNotBefore) {
  const TempDir dir;
  publish(dir / "model", false, "old");
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"model", "exists", "--force"}, [&] { publish(dir / "model", false, "new"); }));
  {
    OutputDirectory out(dir / "model", true);
    write_outputs(out.path(), "new");
    EXPECT_EQ(state_of(dir / "model"), "old");
  }
  EXPECT_EQ(state_of(dir / "model"), "old");
  publish(dir / "model", true, "new");
  EXPECT_EQ(state_of(dir / "model"), "new");
  EXPECT_EQ(listing(dir.path()), std::set<std::string>{"model"});
}

TEST(OutputDirectory, ForceNeverTakesWhatIsNotOurs) {
  const TempDir dir;
  fs::create_directory(dir / "photos");
  put_file(dir / "photos/cat", "meow");
  EXPECT_TRUE(
      fails_with(ErrorKind::kUsage, {"photos", "did not write"}, [&] { publish(dir / "photos", true, "new"); }));
  put_file(dir / "file", "text");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"file", "not a directory"}, [&] { publish(dir / "file", true, "new"); }));
  EXPECT_EQ(get_file(dir / "photos/cat"), "meow");
  fs::create_directory(dir / "empty");
  publish(dir / "empty", true, "new");
  EXPECT_EQ(state_of(dir / "empty"), "new");
}

TEST(OutputDirectory, RefusesTheInputUnderAnyName) {
  const TempDir dir;
  publish(dir / "input", false, "old");
  fs::create_directory_symlink(dir / "input", dir / "alias");
  const auto refused = [&](const fs::path& target, const fs::path& input, const std::string& piece) {
    return fails_with(ErrorKind::kUsage, {piece}, [&] { OutputDirectory out(target, true, {input}); });
  };
  EXPECT_TRUE(refused(dir / "input", dir / "input", "the same as"));
  EXPECT_TRUE(refused(dir / "input/", dir / "input", "the same as"));
  EXPECT_TRUE(refused(dir / "alias", dir / "input", "the same as"));
  EXPECT_TRUE(refused(dir / "input", dir / "alias", "the same as"));
  EXPECT_TRUE(refused(dir / "input/../input", dir / "input", "the same as"));
  EXPECT_TRUE(refused(dir / "input/out", dir / "input", "inside"));
  EXPECT_TRUE(refused(dir / "alias/out", dir / "input", "inside"));
  EXPECT_TRUE(refused(dir / "input", dir / "input/model.safetensors", "holds the input"));
  EXPECT_TRUE(refused(dir.path(), dir / "input", "holds the input"));
  EXPECT_NO_THROW(OutputDirectory(dir / "out", false, {dir / "input", dir / "absent"}));
  EXPECT_EQ(state_of(dir / "input"), "old");
}

TEST(OutputDirectory, RefusesPlacesItCannotWrite) {
  const TempDir dir;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"no/parent", "does not exist"},
                         [&] { OutputDirectory out(dir / "no/parent/out", false); }));
  put_file(dir / "file", "text");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"file/out"}, [&] { OutputDirectory out(dir / "file/out", false); }));
  if (::geteuid() == 0) return;  // root writes anywhere
  fs::create_directory(dir / "closed");
  fs::permissions(dir / "closed", fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"closed", "cannot write"},
                         [&] { OutputDirectory out(dir / "closed/out", false); }));
}

TEST(OutputDirectory, OneWriterAtATime) {
  const TempDir dir;
  OutputDirectory first(dir / "model", false);
  const auto second = [&] { OutputDirectory out(dir / "model", false); };
  const std::string me = "process " + std::to_string(::getpid()) + " on ";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"model", me, "writing it now"}, second));
  EXPECT_EQ(0, in_child([&] {
              return fails_with(ErrorKind::kUsage, {"model", me, "writing it now"}, second) ? 0 : 1;
            }));
  EXPECT_NO_THROW(OutputDirectory(dir / "another", false));
  write_outputs(first.path(), "new");
  first.commit();
  EXPECT_EQ(state_of(dir / "model"), "new");
}

TEST(OutputDirectory, LeftoversOfAKilledProcessAreCleaned) {
  const TempDir dir;
  EXPECT_EQ(7, in_child([&] {
              const OutputDirectory out(dir / "model", false);
              write_outputs(out.path(), "half");
              ::_exit(7);
              return 0;
            }));
  EXPECT_FALSE(fs::exists(dir / "model"));
  publish(dir / "model", false, "new");
  EXPECT_EQ(state_of(dir / "model"), "new");
  EXPECT_EQ(listing(dir.path()), std::set<std::string>{"model"});
}

// Between the two renames where a file system cannot exchange: the old directory is put back.
TEST(OutputDirectory, HalfDoneReplacementIsPutBack) {
  const TempDir dir;
  publish(dir / "model", false, "old");
  fs::rename(dir / "model", dir / ".model.old");
  { const OutputDirectory out(dir / "model", true); }
  EXPECT_EQ(state_of(dir / "model"), "old");
  fs::rename(dir / "model", dir / ".model.old");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"exists"}, [&] { OutputDirectory out(dir / "model", false); }));
  EXPECT_EQ(state_of(dir / "model"), "old");
}

// The process stops at the n-th change to the file system, for every n: the target is the old one or the new one, whole, and the
// next run succeeds and leaves nothing behind.
TEST(OutputDirectory, StopAtEveryWrite) {
  for (const bool replace : {false, true}) {
    bool finished = false;
    int64_t stops = 0;
    std::set<std::string> seen;
    for (int64_t n = 1; !finished; ++n) {
      SCOPED_TRACE(::testing::Message() << (replace ? "replace, " : "create, ") << "write " << n);
      const TempDir dir;
      if (replace) publish(dir / "model", false, "old");
      const int code = in_child([&] {
        set_write_fault([&](int64_t number) {
          if (number == n) ::_exit(42);
        });
        publish(dir / "model", true, "new");
        return 0;
      });
      finished = code == 0;
      ASSERT_TRUE(finished || code == 42) << code;
      stops += finished ? 0 : 1;
      const std::string state = state_of(dir / "model");
      seen.insert(state);
      ASSERT_TRUE(state == "new" || (!finished && state == (replace ? "old" : "absent"))) << state;
      publish(dir / "model", true, "next");
      ASSERT_EQ(state_of(dir / "model"), "next");
      ASSERT_EQ(listing(dir.path()), std::set<std::string>{"model"});
    }
    EXPECT_GT(stops, 15);
    EXPECT_EQ(seen, (std::set<std::string>{replace ? "old" : "absent", "new"}));
  }
}

// The n-th change fails, for every n: an Error, no trace, and the old directory as it was (or the new one, once it is in place).
TEST(OutputDirectory, FailAtEveryWrite) {
  for (const bool replace : {false, true}) {
    bool finished = false;
    for (int64_t n = 1; !finished; ++n) {
      SCOPED_TRACE(n);
      const TempDir dir;
      if (replace) publish(dir / "model", false, "old");
      finished = true;
      {
        const Fault fault([&](int64_t number) {
          if (number == n) fail(ErrorKind::kIo, "injected at {}", number);
        });
        try {
          publish(dir / "model", true, "new");
        } catch (const Error& error) {
          finished = false;
          EXPECT_EQ(error.kind(), ErrorKind::kIo);
        }
      }
      const std::string state = state_of(dir / "model");
      ASSERT_TRUE(state == "new" || (!finished && state == (replace ? "old" : "absent"))) << state;
      ASSERT_EQ(listing(dir.path()), state == "absent" ? std::set<std::string>{} : std::set<std::string>{"model"});
    }
  }
}

TEST(OutputDirectory, FullDiskByFileSizeLimit) {
  const TempDir dir;
  publish(dir / "model", false, "old");
  EXPECT_EQ(0, in_child([&] {
              const rlimit limit{100'000, 100'000};
              ::setrlimit(RLIMIT_FSIZE, &limit);
              const auto result = fails_with(
                  ErrorKind::kIo, {"model.safetensors", "cannot write", "after the first 100000", "bytes free"}, [&] {
                    OutputDirectory out(dir / "model", true);
                    write_safetensors(out.path() / "model.safetensors", {{"x", Tensor::zeros({100'000}, DType::kF32)}});
                    out.commit();
                  });
              if (!result) std::fprintf(stderr, "%s\n", result.message());
              return result ? 0 : 1;
            }));
  EXPECT_EQ(state_of(dir / "model"), "old");
  EXPECT_EQ(listing(dir.path()), std::set<std::string>{"model"});
}

TEST(OutputDirectory, FullDiskOnASmallFileSystem) {
  const TempDir dir;
  const fs::path disk = dir / "disk";
  fs::create_directory(disk);
  if (::mount("lightmoe-test", disk.c_str(), "tmpfs", 0, "size=1m") != 0)
    GTEST_SKIP() << "needs root to mount a small tmpfs";
  const auto write_model = [&](int64_t elements) {
    OutputDirectory out(disk / "model", true);
    SafetensorsWriter writer(out.path(), {{"x", DType::kU8, {elements}}}, {});
    put_file(out.path() / "filler", std::string(200'000, 'x'));  // space that goes away after the check
    writer.write("x", Tensor::zeros({elements}, DType::kU8));
    writer.finish();
    out.commit();
  };
  publish(disk / "model", false, "old");
  // Known before the first byte, and found out on the way.
  const auto before =
      fails_with(ErrorKind::kIo, {"model", "needs 8000000 bytes", "free there"}, [&] { write_model(8'000'000); });
  const auto midway =
      fails_with(ErrorKind::kIo, {"model.safetensors", "No space left", "bytes free"}, [&] { write_model(950'000); });
  const std::string state = state_of(disk / "model");
  const auto names = listing(disk);
  ::umount(disk.c_str());
  EXPECT_TRUE(before);
  EXPECT_TRUE(midway);
  EXPECT_EQ(state, "old");
  EXPECT_EQ(names, std::set<std::string>{"model"});
}

// Hashes made while writing are used only for files that nobody touched since.
TEST(Completeness, SealsWhatIsThere) {
  const TempDir dir;
  OutputDirectory out(dir / "m", false);
  for (const std::string name : {"as_written", "longer", "same_size"}) {
    OutputFile file(out.path() / name);
    file.write("first");
    file.close();
  }
  ::usleep(20'000);  // a tick of the file system's clock
  put_file(out.path() / "longer", "longer than before");
  put_file(out.path() / "same_size", "other");
  put_file(out.path() / "foreign", "not through OutputFile");
  out.commit();
  std::string why;
  EXPECT_TRUE(is_complete(dir / "m", true, &why)) << why;
}

TEST(Completeness, MarkerNoticesEveryChange) {
  const TempDir dir;
  publish(dir / "m", false, "new");
  std::string why;
  const std::string marker = get_file(dir / "m/.complete"), log = get_file(dir / "m/sub/log.txt");
  const auto incomplete = [&](bool hashes, const std::string& piece) {
    why.clear();
    return !is_complete(dir / "m", hashes, &why) && why.find(piece) != std::string::npos;
  };
  put_file(dir / "m/sub/log.txt", log + "!");
  EXPECT_TRUE(incomplete(false, "log.txt: 16 bytes, 15 when written")) << why;
  put_file(dir / "m/sub/log.txt", "First" + log.substr(5));
  EXPECT_TRUE(is_complete(dir / "m", false));
  EXPECT_TRUE(incomplete(true, "log.txt: contents changed")) << why;
  fs::remove(dir / "m/sub/log.txt");
  EXPECT_TRUE(incomplete(false, "log.txt")) << why;
  put_file(dir / "m/sub/log.txt", log);
  EXPECT_TRUE(is_complete(dir / "m", true));
  for (size_t length = 0; length < marker.size(); ++length) {
    put_file(dir / "m/.complete", marker.substr(0, length));
    EXPECT_FALSE(is_complete(dir / "m", false, &why)) << length;
  }
  put_file(dir / "m/.complete", marker + "x");
  EXPECT_TRUE(incomplete(false, "bad line 3"));
  const std::string hash(32, '0');
  for (const std::string& line : std::vector<std::string>{
           "x", hash + " 1", hash + "  x", hash + " -1 x", hash + " 1 /etc/passwd", hash + " 1 ../x",
           hash + " 1 a/../../x", hash + " 99999999999999999999999 x", hash + " 1x x"}) {
    put_file(dir / "m/.complete", line + "\n");
    EXPECT_TRUE(incomplete(false, "bad line")) << line << ": " << why;
  }
  fs::remove(dir / "m/.complete");
  EXPECT_TRUE(incomplete(false, ".complete: cannot open"));
}

}  // namespace
}  // namespace lightmoe
