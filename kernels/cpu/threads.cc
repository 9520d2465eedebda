// Runs a list of launches, each on several threads: on OpenMP's own pool, which torch uses too, or on plain threads.
//
// A list is one parallel region. The programs of a launch are dealt out in one range a thread, so that a thread has
// neighbours, which share keys, and has the same ones in the next launch; who is done with its own helps the others.
// Nobody begins a launch before all programs of the one before it are done. That is counted in programs, not in
// threads: the pool may give fewer threads than it was asked for.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using Run = void (*)(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end);
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Launch {
  Run run;
  int64_t first;  // where its arguments begin in the plan's slots
  int64_t programs;
  int32_t grid[3];
};

struct Place {
  int64_t slot;    // gets the address of
  int64_t tensor;  // this tensor, or for -1 that of the list's failure
};

struct Plan {
  const Launch* launches;
  int64_t n_launches;
  const int64_t* slots;
  int64_t n_slots;
  const Place* places;
  int64_t n_places;
  Parallel parallel;  // GOMP_parallel of the OpenMP runtime in this process, or null
};

// on cache lines of their own, for all threads write to them
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct alignas(64) Count {
  std::atomic<int64_t> left{0};
};

struct Work {
  const Plan& plan;
  const int64_t* args;
  const std::atomic<int64_t>& failure;
  int64_t threads;
  std::vector<Range> ranges;  // [n_launches, threads]
  std::vector<Count> counts;  // [n_launches]
  std::atomic<int64_t> tickets{0};

  Work(const Plan& plan, const int64_t* args, const std::atomic<int64_t>& failure, int64_t threads)
      : plan(plan), args(args), failure(failure), threads(threads), ranges(plan.n_launches * threads),
        counts(plan.n_launches) {
    for (int64_t i = 0; i < plan.n_launches; ++i) {
      const int64_t programs = plan.launches[i].programs;
      counts[i].left = programs;
      for (int64_t t = 0; t < threads; ++t) {
        ranges[i * threads + t].next = programs * t / threads;
        ranges[i * threads + t].end = programs * (t + 1) / threads;
      }
    }
  }
};

// Runs what is left of a range in chunks that get smaller towards its end, so that all threads end together.
int64_t take(const Launch& launch, const int64_t* args, Range& range) {
  int64_t done = 0, begin = range.next.load(std::memory_order_relaxed);
  while (begin < range.end) {
    const int64_t end = begin + std::max<int64_t>(1, (range.end - begin) / 8);
    if (!range.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    launch.run(args + launch.first, launch.grid, begin, end);
    done += end - begin;
    begin = range.next.load(std::memory_order_relaxed);
  }
  return done;
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void work_off(void* data) {
  Work& work = *static_cast<Work*>(data);
  const int64_t mine = work.tickets.fetch_add(1);
  for (int64_t i = 0; i < work.plan.n_launches; ++i) {
    int64_t done = 0;
    for (int64_t t = 0; t < work.threads; ++t)
      done += take(work.plan.launches[i], work.args, work.ranges[i * work.threads + (mine + t) % work.threads]);
    std::atomic<int64_t>& left = work.counts[i].left;
    left.fetch_sub(done);
    for (int spins = 0; left.load() > 0; ++spins)
      if (spins < 4096)
        pause();
      else
        std::this_thread::yield();  // whoever has the rest may need this core
    if (work.failure.load()) return;
  }
}

}  // namespace

// Runs the plan's launches in order and returns the failure of the first that reports one, which is the last to run;
// 0 if none does. tensors: their addresses.
extern "C" __attribute__((visibility("default"))) int64_t fastattn_drive(const Plan* plan, const int64_t* tensors,
                                                                         int64_t threads) {
  std::atomic<int64_t> failure{0};
  std::vector<int64_t> args(plan->slots, plan->slots + plan->n_slots);
  for (int64_t i = 0; i < plan->n_places; ++i) {
    const Place& place = plan->places[i];
    args[place.slot] = place.tensor < 0 ? (int64_t)&failure : tensors[place.tensor];
  }
  int64_t most = 0;
  for (int64_t i = 0; i < plan->n_launches; ++i) most = std::max(most, plan->launches[i].programs);
  threads = std::min(threads, most);
  if (threads <= 1) {
    for (int64_t i = 0; i < plan->n_launches && !failure; ++i) {
      const Launch& launch = plan->launches[i];
      launch.run(args.data() + launch.first, launch.grid, 0, launch.programs);
    }
    return failure;
  }
  Work work(*plan, args.data(), failure, threads);
  if (plan->parallel) {
    plan->parallel(work_off, &work, (unsigned)threads, 0);
    return failure;
  }
  std::vector<std::thread> others;
  try {
    while ((int64_t)others.size() < threads - 1) others.emplace_back(work_off, &work);
  } catch (const std::system_error&) {
    // the machine has no more threads to give: those that are there do it all
  }
  work_off(&work);
  for (auto& other : others) other.join();
  return failure;
}

// A launch that checks row numbers: args are an int32 array, its size, how many of them a program looks at, a length,
// the failure to report and where. Each value must be -1 or a row below length.
extern "C" __attribute__((visibility("default"))) void fastattn_check_rows(const int64_t* args, const int32_t*,
                                                                           int64_t begin, int64_t end) {
  const int32_t* rows = (const int32_t*)args[0];
  const uint32_t length = (uint32_t)args[3];
  end = std::min(end * args[2], args[1]);
  uint32_t outside = 0;
  for (int64_t i = begin * args[2]; i < end; ++i) outside |= (uint32_t)rows[i] + 1 > length;  // -1 becomes 0
  if (outside) ((std::atomic<int64_t>*)args[5])->store(args[4]);
}

// A launch that fills memory: args are its address, its size in bytes, how many words a program writes, and the word of
// 8 bytes that it gets over and over. The last one may be cut short.
extern "C" __attribute__((visibility("default"))) void fastattn_fill(const int64_t* args, const int32_t*, int64_t begin,
                                                                     int64_t end) {
  char* memory = (char*)args[0];
  end = std::min(end * args[2] * 8, args[1]);
  int64_t at = begin * args[2] * 8;
  for (; at + 8 <= end; at += 8) std::memcpy(memory + at, &args[3], 8);
  if (at < end) std::memcpy(memory + at, &args[3], end - at);
}
