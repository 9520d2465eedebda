// The part of NVIDIA's driver that launches kernels, declared here and looked up at run time: a library that is linked
// with nothing of CUDA's loads on every machine, and misses the driver only when a CUDA session runs a node of ours.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastattn::cuda {

using Result = int;  // 0 is success
using DeviceId = int;
using Address = unsigned long long;
struct Context;
struct Stream;
struct Library;
struct Kernel;

enum DeviceAttribute : int { kCapabilityMajor = 75, kCapabilityMinor = 76 };
enum FunctionAttribute : int { kMaxDynamicSharedBytes = 8 };
enum LaunchAttributeId : int { kClusterDimension = 4, kClusterScheduling = 5 };
enum ClusterScheduling : int { kSpread = 1 };

struct LaunchAttribute {
  LaunchAttributeId id;
  char padding[4];
  union {
    char bytes[64];
    unsigned cluster[3];
    ClusterScheduling scheduling;
  };
};

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];  // threads
  unsigned shared_bytes;
  Stream* stream;
  LaunchAttribute* attributes;
  unsigned n_attributes;
};

// Functions are called as in NVIDIA's "CUDA Driver API", without the cu; the oldest driver that has all is 12.0's.
struct Driver {
  // Opens libcuda.so.1 at the first call. Throws Error where it is missing or too old, and tries again at the next.
  static const Driver& get();

  Result (*GetErrorName)(Result, const char**);
  Result (*GetErrorString)(Result, const char**);
  Result (*StreamGetCtx)(Stream*, Context**);
  Result (*CtxPushCurrent)(Context*);
  Result (*CtxPopCurrent)(Context**);
  Result (*CtxGetDevice)(DeviceId*);
  Result (*DeviceGetAttribute)(int*, DeviceAttribute, DeviceId);
  // options of the compiler of PTX, which a cubin has no use for, and of the library
  Result (*LibraryLoadData)(Library**, const void* code, void*, void*, unsigned, void*, void*, unsigned);
  Result (*LibraryGetKernel)(Kernel**, Library*, const char* name);
  Result (*KernelSetAttribute)(FunctionAttribute, int value, Kernel*, DeviceId);
  Result (*LaunchKernelEx)(const LaunchConfig*, Kernel*, void** parameters, void** extra);
  Result (*MemAllocAsync)(Address*, size_t bytes, Stream*);
  Result (*MemFreeAsync)(Address, Stream*);
  Result (*MemcpyDtoHAsync)(void* to, Address from, size_t bytes, Stream*);
  Result (*StreamSynchronize)(Stream*);
  Result (*MemsetD32Async)(Address, unsigned word, size_t count, Stream*);

  // Throws Error with what was tried, and on what, and with the driver's own words, unless the result is success.
  void check(Result result, const char* function, const char* on = nullptr) const;
};

}  // namespace fastattn::cuda
