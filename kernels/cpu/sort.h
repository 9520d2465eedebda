// Stable sorts of fp32 keys: what hashing methods spend most of routing on.
#pragma once
#include <cstdint>

namespace fastattn {

// A key and the row that it is of, as one number whose upper half is in the order of the keys: -0 equals 0, and every
// NaN is above all numbers.
uint64_t keyed(float key, uint32_t row);

// Sorts by the upper halves; equal ones keep their order. spare: room for as many. Returns which of the two holds them.
uint64_t* radix_sort(uint64_t* pairs, uint64_t* spare, int64_t count);

}  // namespace fastattn
