// What is no kernel: loops of C++ that are compiled for each instruction set, as the kernels are.
#pragma once
#include <cstdint>

namespace fastattn {

struct Routines {
  // fp32 to fp16, to the nearest.
  void (*narrow)(const float* from, uint16_t* to, int64_t count);

  // Of each of n_rows rows of x [n_rows, dim]: its products with directions [n_directions, dim], to
  // products[direction * stride + row], and its square, to squares[row]. is_half: x is fp16, else fp32.
  void (*project)(const void* x, bool is_half, int64_t n_rows, int64_t dim, const float* directions,
                  int64_t n_directions, float* products, int64_t stride, float* squares);

  // out[i] = products[i] + direction * sqrt(max(radius - squares[i], 0)); out may be products.
  void (*lift)(const float* products, const float* squares, float direction, float radius, float* out, int64_t count);
};

}  // namespace fastattn
