// Compiled once for each instruction set: FASTATTN_LEVEL is the name of its table, FASTATTN_LANES how many lanes of 32
// bits its vectors have. No function here may have another linkage than that of this file.
#include "routines.h"

#include "vectors.h"
//
#include "halves.h"
//
#include "memory.h"

namespace {

constexpr int W = FASTATTN_LANES;

f16* halves(uint16_t* x) { return (f16*)x; }

void narrow(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(halves(to + i), load<float, W>(from + i));
  for (; i < count; ++i) write(halves(to + i), from[i]);
}

}  // namespace

namespace fastattn {

extern const Routines FASTATTN_LEVEL;
const Routines FASTATTN_LEVEL{narrow};

}  // namespace fastattn
