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
typedef V<float, W> Vector;

f16* halves(uint16_t* x) { return (f16*)x; }

void narrow(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(halves(to + i), load<float, W>(from + i));
  for (; i < count; ++i) write(halves(to + i), from[i]);
}

float sum(Vector x) {
  fold_lanes([](auto& a, auto b) { a += b; }, x);
  return x[0];
}

// M rows and G directions at a time, whose sums stay in registers
template <int M, int G, class T>
void project_tile(const T* x, int64_t dim, const float* directions, float* products, int64_t stride, float* squares) {
  Vector total[M][G] = {}, square[M] = {};
  float rest[M][G] = {}, square_rest[M] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    Vector row[M];
    for (int m = 0; m < M; ++m) {
      row[m] = load<T, W>(x + m * dim + d);
      if (squares) square[m] += row[m] * row[m];
    }
    for (int g = 0; g < G; ++g) {
      const Vector direction = load<float, W>(directions + g * dim + d);
      for (int m = 0; m < M; ++m) total[m][g] += row[m] * direction;
    }
  }
  for (; d < dim; ++d)
    for (int m = 0; m < M; ++m) {
      const float value = read(x + m * dim + d);
      square_rest[m] += value * value;
      for (int g = 0; g < G; ++g) rest[m][g] += value * directions[g * dim + d];
    }
  for (int m = 0; m < M; ++m) {
    if (squares) squares[m] = sum(square[m]) + square_rest[m];
    for (int g = 0; g < G; ++g) products[g * stride + m] = sum(total[m][g]) + rest[m][g];
  }
}

template <int M, class T>
void project_rows(const T* x, int64_t dim, const float* directions, int64_t n_directions, float* products,
                  int64_t stride, float* squares) {
  int64_t g = 0;
  for (; g + 4 <= n_directions; g += 4)
    project_tile<M, 4>(x, dim, directions + g * dim, products + g * stride, stride, g ? nullptr : squares);
  for (; g < n_directions; ++g)
    project_tile<M, 1>(x, dim, directions + g * dim, products + g * stride, stride, g ? nullptr : squares);
}

template <class T>
void project_all(const T* x, int64_t n_rows, int64_t dim, const float* directions, int64_t n_directions,
                 float* products, int64_t stride, float* squares) {
  int64_t row = 0;
  for (; row + 4 <= n_rows; row += 4)
    project_rows<4>(x + row * dim, dim, directions, n_directions, products + row, stride, squares + row);
  for (; row < n_rows; ++row)
    project_rows<1>(x + row * dim, dim, directions, n_directions, products + row, stride, squares + row);
}

void project(const void* x, bool is_half, int64_t n_rows, int64_t dim, const float* directions, int64_t n_directions,
             float* products, int64_t stride, float* squares) {
  if (is_half)
    project_all((const f16*)x, n_rows, dim, directions, n_directions, products, stride, squares);
  else
    project_all((const float*)x, n_rows, dim, directions, n_directions, products, stride, squares);
}

void lift(const float* products, const float* squares, float direction, float radius, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float height = radius - squares[i];
    out[i] = products[i] + direction * __builtin_sqrtf(height > 0 ? height : 0);
  }
}

}  // namespace

namespace fastattn {

extern const Routines FASTATTN_LEVEL;
const Routines FASTATTN_LEVEL{narrow, project, lift};

}  // namespace fastattn
