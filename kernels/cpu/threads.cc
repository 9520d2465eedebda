// Runs the programs of a kernel on several threads: on OpenMP's own pool, which torch uses too, or on plain threads.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Run = void (*)(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end);
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Work {
  Run run;
  const int64_t* args;
  const int32_t* grid;
  int64_t programs, chunk;
  std::atomic<int64_t> next{0};
};

void take_chunks(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (;;) {
    const int64_t begin = work.next.fetch_add(work.chunk);
    if (begin >= work.programs) return;
    work.run(work.args, work.grid, begin, begin + work.chunk < work.programs ? begin + work.chunk : work.programs);
  }
}

}  // namespace

// parallel: GOMP_parallel of the OpenMP runtime in this process, or null
extern "C" __attribute__((visibility("default"))) void fastattn_drive(Run run, const int64_t* args, const int32_t* grid,
                                                                      int64_t threads, Parallel parallel) {
  const int64_t programs = (int64_t)grid[0] * grid[1] * grid[2];
  if (threads > programs) threads = programs;
  if (threads <= 1) return run(args, grid, 0, programs);
  Work work{run, args, grid, programs, 1};
  // neighbours share keys, so chunks are long, but there are enough of them to even out the threads
  work.chunk = programs / (threads * 16) < 1 ? 1 : programs / (threads * 16);
  if (parallel) return parallel(take_chunks, &work, (unsigned)threads, 0);
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(take_chunks, &work);
  take_chunks(&work);
  for (auto& other : others) other.join();
}
