// SMYRF's hashes of queries and keys: products with the directions, and the heights that put all rows on one sphere.
#include <algorithm>
#include <limits>

#include "cpu.h"
#include "heads.h"
#include "ops.h"
#include "routines.h"

namespace fastattn {
namespace {

constexpr int64_t kRowsATask = 256;
constexpr int64_t kNumbersATask = 1 << 14;

// The rows of one side, of all of its heads: products [heads, rounds, length], squares [heads, length].
struct Side {
  const Tensor& x;
  float* products;
  float* squares;
};

void project(CpuDevice& device, const Side& side, const float* directions, int64_t rounds) {
  const int64_t length = side.x[2], dim = side.x[3], chunks = ceil_div(length, kRowsATask);
  const bool is_half = side.x.type == Type::fp16;
  const char* rows = side.x.as<char>();
  device.parallel(side.x[0] * side.x[1] * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / chunks, first = task % chunks * kRowsATask;
      level().routines->project(rows + (head * length + first) * dim * (is_half ? 2 : 4), is_half,
                                std::min(kRowsATask, length - first), dim, directions, rounds,
                                side.products + head * rounds * length + first, length,
                                side.squares + head * length + first);
    }
  });
}

// The largest square of each head's rows that take part; 0 where none does.
std::vector<float> largest(CpuDevice& device, const Side& side, const Tensor& mask) {
  const int64_t heads = side.x[0] * side.x[1], length = side.x[2];
  std::vector<float> most(heads, 0);
  device.parallel(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const uint8_t* takes_part = mask.as<uint8_t>() + head / side.x[1] * length;
      for (int64_t i = 0; i < length; ++i)
        if (takes_part[i]) most[head] = std::max(most[head], side.squares[head * length + i]);
    }
  });
  return most;
}

struct SmyrfHash : Node {
  void run(const Context& context) const override {
    const Tensor q = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = q[0], heads = q[1], n = q[2], dim = q[3];
    const Tensor k = context.input(1).expect({batch, -1, -1, dim});
    const int64_t kv_heads = k[1], s = k[2];
    check_heads(heads, kv_heads);
    const Tensor projections = context.input(2).expect({dim + 2, -1});
    const int64_t rounds = projections[1];
    const Tensor query_mask = context.input(3).expect({batch, n}), key_mask = context.input(4).expect({batch, s});
    float* q_hash = static_cast<float*>(context.output(0, {batch, heads, rounds, n}));
    float* k_hash = static_cast<float*>(context.output(1, {batch, heads, rounds, s}));

    CpuDevice& device = static_cast<CpuDevice&>(context.device());
    const auto floats = [&](std::initializer_list<int64_t> sizes) {
      return static_cast<float*>(device.scratch(4 * product(sizes)));
    };
    // turned, so that directions are rows; the last two are those of the keys' and the queries' heights
    const float* given = projections.as<float>();
    float* directions = floats({rounds, dim + 2});
    for (int64_t r = 0; r < rounds; ++r)
      for (int64_t d = 0; d < dim; ++d) directions[r * dim + d] = given[d * rounds + r];

    if (!q_hash) q_hash = floats({batch, heads, rounds, n});
    if (!k_hash) k_hash = floats({batch, heads, rounds, s});
    const Side queries{q, q_hash, floats({batch, heads, n})};
    const Side keys{k, floats({batch, kv_heads, rounds, s}), floats({batch, kv_heads, s})};
    project(device, queries, directions, rounds);
    project(device, keys, directions, rounds);
    const std::vector<float> q_most = largest(device, queries, query_mask), k_most = largest(device, keys, key_mask);

    const int64_t group = kv_heads ? heads / kv_heads : 1;
    device.parallel(batch * heads * rounds, std::max<int64_t>(1, kNumbersATask / std::max<int64_t>(1, n + s)),
                    [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / rounds, r = task % rounds;
        const int64_t kv_head = head / heads * kv_heads + head % heads / group;
        const float radius = q_most[head] + k_most[kv_head];
        float* mine = q_hash + task * n;
        level().routines->lift(mine, queries.squares + head * n, given[(dim + 1) * rounds + r], radius, mine, n);
        level().routines->lift(keys.products + (kv_head * rounds + r) * s, keys.squares + kv_head * s,
                               given[dim * rounds + r], radius, k_hash + task * s, s);
      }
    });
  }
};

}  // namespace

Definition smyrf_hash() {
  return {"SmyrfHash",
          kEachT,
          {{"q"}, {"k"}, {"projections", Port::fp32}, {"query_mask", Port::boolean}, {"key_mask", Port::boolean}},
          {{"q_hash", Port::fp32}, {"k_hash", Port::fp32}},
          [](const Attributes&) { return std::make_unique<SmyrfHash>(); }};
}

}  // namespace fastattn
