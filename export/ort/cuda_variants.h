// Kernels that were compiled for GPUs: tables that cubins.py writes, empty where none were asked for.
#pragma once
#include "cubin.h"
#include "launch.h"

namespace fastattn::cuda {

struct CudaVariant {
  Variant variant;  // first, as choose() wants it
  const Cubin* cubin;
};

// Those for one architecture. is_exact: they run on no other; else on all of the same major number and of a minor one
// that is not below.
struct Target {
  int major, minor;
  bool is_exact;
  const CudaVariant* variants;
  size_t n_variants;
};

extern const Target kTargets[];
extern const size_t kTargetCount;

}  // namespace fastattn::cuda
