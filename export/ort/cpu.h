// The CPU as a device: kernels that the CPU engine generated, on ONNX Runtime's own threads.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "framework.h"

namespace fastattn {

using Run = void (*)(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end);

struct CpuVariant {
  Variant variant;
  Run run;
};

struct Routines;  // routines.h

// All that was compiled for one instruction set.
struct Level {
  const char* name;
  const char* const* needs;  // the processor's features, as Linux calls them; null ends the list
  const CpuVariant* variants;
  size_t n_variants;
  const Routines* routines;
};

// A table that the build writes, the best level first.
extern const Level kLevels[];
extern const size_t kLevelCount;

// The best that this processor has, chosen once; throws Error if it has none of them.
const Level& level();

class CpuDevice : public Device {
 public:
  explicit CpuDevice(const OrtKernelContext* context) : context_(context) {}

  const Variant& choose(const Launch& launch, std::initializer_list<Size> sizes) override;
  void run(const Variant& variant, const Launch& launch, Grid grid) override;
  void* scratch(size_t bytes) override;
  int64_t chunk(int64_t length) const override { return chunk_of(length, 16, 1024); }
  void fill(float* memory, float value, int64_t count) override;
  void narrow(const float* from, void* to, int64_t count) override;
  void check_values(const char* name, const int32_t* values, int64_t count, int64_t least, int64_t most) override;
  int32_t peek(const int32_t* number) override { return *number; }
  void repeat(void* to, const void* piece, size_t bytes, int64_t count) override;
  void block_numbers(const int32_t* index, int64_t n_indices, int64_t n_blocks, int64_t block_size, int64_t length,
                     int32_t absent, int32_t* numbers) override;
  // cpu_steps.cc
  void sum_parts(Type type, const void* parts, int64_t rows, int64_t n_parts, int64_t size, int64_t part_size,
                 void* total) override;
  void fold(const float* outs, const float* lses, int64_t rows, int64_t n_parts, int64_t n_queries, int64_t dim,
            float* out, float* lse) override;
  void largest(const float* numbers, int64_t rows, int64_t n, int64_t k, int32_t* places) override;
  void listed_keys(const int32_t* places, const int32_t* groups, const float* logits, int64_t queries, int64_t k,
                   int64_t n_groups, int64_t group_size, int32_t* keys) override;
  void first_centroids(const int64_t* codes, const int32_t* initial, int64_t rows, int64_t length, int64_t n_clusters,
                       int32_t* centroids, int32_t* ranks) override;
  void sort_by_cluster(const int32_t* clusters, int64_t rows, int64_t length, int64_t n_clusters, int32_t* order,
                       int32_t* offsets) override;

  // Calls body(begin, end) for ranges that make up 0 .. count - 1, on ONNX Runtime's threads. least: how many are worth
  // a task. An exception of any of them is thrown again here, once all are done.
  void parallel(int64_t count, int64_t least, const std::function<void(int64_t begin, int64_t end)>& body);

 private:
  struct Free {
    void operator()(void* memory) const { free(memory); }
  };

  const OrtKernelContext* context_;
  std::vector<std::unique_ptr<void, Free>> scratch_;
};

}  // namespace fastattn
