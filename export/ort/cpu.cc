#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <set>
#include <sstream>

#include "routines.h"

namespace fastattn {

namespace {

constexpr int64_t kMostTasks = 256;       // of one launch: enough to even out, few enough to cost nothing
constexpr int64_t kWordsATask = 1 << 14;  // of what goes through memory once

std::set<std::string> features() {
  std::set<std::string> found;
#if defined(__x86_64__)
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, 5, "flags") == 0) {
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) found.insert(word);
      break;
    }
#endif
  return found;
}

bool has_all(const std::set<std::string>& features, const char* const* needs) {
  for (; *needs; ++needs)
    if (!features.count(*needs)) return false;
  return true;
}

const Level* best_level() {
  const std::set<std::string> has = features();
  for (size_t i = 0; i < kLevelCount; ++i)
    if (has_all(has, kLevels[i].needs)) return &kLevels[i];
  return nullptr;
}

}  // namespace

const Level& level() {
  static const Level* best = best_level();
  if (!best) throw Error(std::string("this library was built for processors with ") + kLevels[kLevelCount - 1].name);
  return *best;
}

const Variant& CpuDevice::choose(const Launch& launch, std::initializer_list<Size> sizes) {
  const Level& own = level();
  const size_t at = fastattn::choose(own.variants, own.n_variants, sizeof(CpuVariant), launch, sizes);
  if (at == own.n_variants)
    throw Error("this library has no " + launch.describe() + " for " + own.name +
                ": fastattn.export.session builds what a model needs, `fastattn build --ort` what its options say");
  return own.variants[at].variant;
}

void CpuDevice::run(const Variant& variant, const Launch& launch, Grid grid) {
  const int64_t programs = product({grid.x, grid.y, grid.z});
  if (programs == 0) return;
  if (programs > INT32_MAX) throw Error(std::string(launch.kernel) + " would have 2^31 programs or more");
  std::vector<int64_t> args(variant.n_parameters);
  for (size_t i = 0; i < args.size(); ++i) args[i] = value_of(variant.parameters[i], launch);
  const int32_t sides[3] = {(int32_t)grid.x, (int32_t)grid.y, (int32_t)grid.z};
  const Run run = reinterpret_cast<const CpuVariant&>(variant).run;
  parallel(programs, 1, [&](int64_t begin, int64_t end) { run(args.data(), sides, begin, end); });
}

void* CpuDevice::scratch(size_t bytes) {
  const size_t whole = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
  if (whole < bytes) throw std::bad_alloc();
  void* memory = std::aligned_alloc(256, whole);
  if (!memory) throw std::bad_alloc();
  scratch_.emplace_back(memory);
  return memory;
}

void CpuDevice::fill(float* memory, float value, int64_t count) {
  parallel(count, kWordsATask, [&](int64_t begin, int64_t end) { std::fill(memory + begin, memory + end, value); });
}

void CpuDevice::narrow(const float* from, void* to, int64_t count) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  parallel(count, kWordsATask, [&](int64_t begin, int64_t end) {
    level().routines->narrow(from + begin, halves + begin, end - begin);
  });
}

void CpuDevice::check_values(const char* name, const int32_t* values, int64_t count, int64_t least, int64_t most) {
  std::atomic<bool> is_outside{false};
  parallel(count, kWordsATask, [&](int64_t begin, int64_t end) {
    bool outside = false;
    for (int64_t i = begin; i < end; ++i) outside |= values[i] < least || values[i] > most;
    if (outside) is_outside = true;
  });
  if (is_outside)
    throw Error(std::string(name) + " must hold numbers from " + std::to_string(least) + " to " +
                std::to_string(most) + ", got others");
}

void CpuDevice::repeat(void* to, const void* piece, size_t bytes, int64_t count) {
  if (bytes == 1) std::memset(to, *(const char*)piece, count);
  else for (int64_t i = 0; i < count; ++i) std::memcpy((char*)to + i * bytes, piece, bytes);
}

void CpuDevice::block_numbers(const int32_t* index, int64_t n_indices, int64_t n_blocks, int64_t block_size,
                              int64_t length, int32_t absent, int32_t* numbers) {
  parallel(n_indices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t* mine = numbers + i * length;
      std::fill(mine, mine + length, absent);
      const int32_t* rows = index + i * n_blocks * block_size;
      for (int64_t at = 0; at < n_blocks * block_size; ++at)
        if (rows[at] >= 0) mine[rows[at]] = (int32_t)(at / block_size);
    }
  });
}

namespace {

struct Tasks {
  const std::function<void(int64_t, int64_t)>& body;
  int64_t count, tasks;
  std::mutex lock;
  std::exception_ptr failure;
};

}  // namespace

void CpuDevice::parallel(int64_t count, int64_t least, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  Tasks all{body, count, std::min(kMostTasks, ceil_div(count, least)), {}, nullptr};
  if (all.tasks == 1) return body(0, count);
  const auto task = [](void* data, size_t at) {
    Tasks& all = *static_cast<Tasks*>(data);
    // its share of the count: count * at / tasks without the product, which may not fit
    const int64_t share = all.count / all.tasks, rest = all.count % all.tasks, i = (int64_t)at;
    const int64_t begin = share * i + std::min(i, rest), end = begin + share + (i < rest);
    try {
      all.body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> held(all.lock);
      all.failure = std::current_exception();
    }
  };
  check(ort::KernelContext_ParallelFor(context_, task, (size_t)all.tasks, 0, &all));
  if (all.failure) std::rethrow_exception(all.failure);
}

}  // namespace fastattn
