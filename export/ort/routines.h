// What is no kernel: loops of C++ that are compiled for each instruction set, as the kernels are.
#pragma once
#include <cstdint>

namespace fastattn {

struct Routines {
  // fp32 to fp16, to the nearest.
  void (*narrow)(const float* from, uint16_t* to, int64_t count);
};

}  // namespace fastattn
