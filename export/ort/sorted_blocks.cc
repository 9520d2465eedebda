// The rows that take part, sorted by their hashes and cut into blocks.
#include <algorithm>

#include "cpu.h"
#include "ops.h"
#include "sort.h"

namespace fastattn {
namespace {

struct SortedBlocks : Node {
  bool is_packed;

  explicit SortedBlocks(const Attributes& attributes) : is_packed(attributes.flag("packed")) {}

  // The first of the sorted rows that a block gets, of count rows.
  int64_t first(int64_t block, int64_t blocks, int64_t size, int64_t count) const {
    if (is_packed) return size && block > count / size ? count : std::min(block * size, count);
    return (int64_t)((__int128)block * count / blocks);
  }

  void run(const Context& context) const override {
    const Tensor hashes = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = hashes[0], heads = hashes[1], rounds = hashes[2], n = hashes[3];
    const Tensor mask = context.input(1).expect({batch, n});
    const int64_t blocks = context.input(2).expect({1}).as<int64_t>()[0];
    const int64_t size = context.input(3).expect({1}).as<int64_t>()[0];
    if (blocks < 0 || size < 0) throw Error("n_blocks and block_size must not be negative");
    if (n > INT32_MAX) throw Error("hashes must be of fewer than 2^31 rows");
    int32_t* out = static_cast<int32_t*>(context.output(0, {batch, heads, rounds, blocks, size}));
    if (!out) return;

    CpuDevice& device = static_cast<CpuDevice&>(context.device());
    device.parallel(batch * heads * rounds, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> pairs(n), spare(n);
      for (int64_t task = begin; task < end; ++task) {
        const float* keys = hashes.as<float>() + task * n;
        const uint8_t* takes_part = mask.as<uint8_t>() + task / (heads * rounds) * n;
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i)
          if (takes_part[i]) pairs[count++] = keyed(keys[i], (uint32_t)i);
        const uint64_t* sorted = radix_sort(pairs.data(), spare.data(), count);
        int32_t* to = out + task * blocks * size;
        for (int64_t block = 0; block < blocks && size; ++block, to += size) {
          const int64_t from = first(block, blocks, size, count);
          const int64_t members = std::min(size, first(block + 1, blocks, size, count) - from);
          for (int64_t i = 0; i < members; ++i) to[i] = (int32_t)(uint32_t)sorted[from + i];
          std::fill(to + members, to + size, -1);
        }
      }
    });
  }
};

}  // namespace

Definition sorted_blocks() {
  return {"SortedBlocks",
          kNoTypes,
          {{"hashes", Port::fp32}, {"mask", Port::boolean}, {"n_blocks", Port::int64}, {"block_size", Port::int64}},
          {{"blocks", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<SortedBlocks>(attributes); }};
}

}  // namespace fastattn
