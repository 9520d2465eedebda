#include "sort.h"

#include <cstring>
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
  bits = bits >> 31 ? ~bits : bits | 0x80000000;
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
