// What ops that attend by head share: checks, strides, and results that are fp32 until they are done.
#pragma once
#include "framework.h"

namespace fastattn {

constexpr double kLog2E = 1.4426950408889634;  // kernels' exponentials are of two

// Throws Error unless query heads are a multiple of key heads.
void check_heads(int64_t heads, int64_t kv_heads);

// Throws Error for lengths that kernels, which count rows in 32 bits, can't step through.
void check_lengths(std::initializer_list<int64_t> lengths);

// The tensor as it is, if it has this shape, or its one number in all places.
Tensor repeated(Device& device, Tensor given, const Shape& shape);

// The strides of a contiguous tensor (batch, heads, length, dim), as arguments prefix_stride_b, _h and _n.
void give_strides(Launch& launch, const Tensor& x, std::initializer_list<std::string_view> names);

// An output of a kernel that writes fp32 whatever the inputs are: straight into it, or by way of scratch memory.
class Result {
 public:
  Result(const Context& context, size_t at, const Shape& shape);
  float* data() const { return data_; }
  int64_t count() const { return count_; }
  void finish() const;  // once what writes it has been launched

 private:
  Device& device_;
  void* output_;
  bool is_narrow_;
  int64_t count_;
  float* data_;
};

}  // namespace fastattn
