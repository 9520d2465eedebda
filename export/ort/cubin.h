// A kernel that was compiled for a GPU; apart from the tables that name it, for it is not compiled anew for them.
#pragma once
#include <cstdint>

namespace fastattn::cuda {

struct Cubin {
  const void* image;
  const char* entry;
  unsigned num_warps;  // of 32 threads
  unsigned num_ctas;   // thread blocks of a cluster, which are one program; 1 without clusters
  unsigned shared_bytes;
};

}  // namespace fastattn::cuda
