#include "sort.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace fastattn {

namespace {

constexpr int kDigits = 3, kBits = 11, kValues = 1 << kBits;  // 3 times 11 bits are 32 and one

uint32_t digit(uint64_t pair, int at) { return (uint32_t)(pair >> (32 + at * kBits)) & (kValues - 1); }

}  // namespace

uint64_t keyed(float key, uint32_t row) {
  uint32_t bits;
  key += 0.0f;  // 0 of -0
  std::memcpy(&bits, &key, sizeof bits);
  if (key != key) bits = 0x7fffffff;
  bits ^= (uint32_t)((int32_t)bits >> 31) | 0x80000000;  // the sign bit; of negative numbers all: a branch is a guess
  return (uint64_t)bits << 32 | row;
}

uint64_t* radix_sort(uint64_t* pairs, uint64_t* spare, int64_t count) {
  int64_t places[kDigits][kValues] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int at = 0; at < kDigits; ++at) ++places[at][digit(pairs[i], at)];
  for (int at = 0; at < kDigits; ++at) {
    int64_t sum = 0, most = 0;
    for (int64_t& place : places[at]) {
      most = most < place ? place : most;
      sum += std::exchange(place, sum);
    }
    if (most == count) continue;  // all have the same
    for (int64_t i = 0; i < count; ++i) spare[places[at][digit(pairs[i], at)]++] = pairs[i];
    std::swap(pairs, spare);
  }
  return pairs;
}

}  // namespace fastattn

// A launch that sorts rows, one a program: args are the addresses of their keys and of their orders (int32), the size of
// a row, whether keys are int16 and not fp32, and the failure to report where there is no memory and where.
extern "C" __attribute__((visibility("default"))) void fastattn_sort_rows(const int64_t* args, const int32_t*,
                                                                          int64_t begin, int64_t end) {
  const int64_t n = args[2];
  const bool is_short = args[3];
  const std::unique_ptr<uint64_t[]> pairs(new (std::nothrow) uint64_t[2 * n]);
  if (!pairs) {
    ((std::atomic<int64_t>*)args[5])->store(args[4]);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const float* floats = (const float*)args[0] + row * n;
    const int16_t* shorts = (const int16_t*)args[0] + row * n;
    if (is_short)
      for (int64_t i = 0; i < n; ++i) pairs[i] = (uint64_t)(uint32_t)(shorts[i] + 32768) << 32 | (uint32_t)i;
    else
      for (int64_t i = 0; i < n; ++i) pairs[i] = fastattn::keyed(floats[i], (uint32_t)i);
    const uint64_t* sorted = fastattn::radix_sort(&pairs[0], &pairs[n], n);
    int32_t* order = (int32_t*)args[1] + row * n;
    for (int64_t i = 0; i < n; ++i) order[i] = (int32_t)(uint32_t)sorted[i];
  }
}
