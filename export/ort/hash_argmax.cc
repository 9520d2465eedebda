// Angular LSH, a launch for each factor of a hash: kernels/hash_argmax.py.
#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

struct HashArgmax : Node {
  std::vector<int64_t> factors;
  int64_t columns = 0;  // of the rotations, half of all factors' buckets

  explicit HashArgmax(const Attributes& attributes) : factors(attributes.integers("factors")) {
    int64_t buckets = 1;
    for (int64_t factor : factors) {
      if (factor < 2 || factor % 2) throw Error("factors must be even and positive, got " + std::to_string(factor));
      buckets = product({buckets, factor});
      product_below(INT32_MAX - 1, "buckets", {buckets});
      columns += factor / 2;
    }
    if (factors.empty()) throw Error("factors must not be empty");
  }

  void run(const Context& context) const override {
    const Tensor x = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = x[0], heads = x[1], n = x[2], dim = x[3];
    check_lengths({n});
    const Tensor rotations = context.input(1).expect({-1, dim, -1, columns});
    const int64_t of_heads = rotations[0], rounds = rotations[2];
    if (of_heads != 1 && of_heads != heads)
      throw Error("rotations must be for 1 head or for " + std::to_string(heads) + ", got " + std::to_string(of_heads));
    product_below(INT32_MAX, "numbers in rotations", {rotations.shape.count()});
    Device& device = context.device();
    void* buckets = context.output(0, {batch, heads, rounds, n});
    if (!buckets || batch * heads * rounds * n == 0) return;

    Launch launch("hash_argmax_digit");
    launch.pointer("x_ptr", x.type, x.data).pointer("buckets_ptr", Type::int32, buckets);
    launch.pointer("rotations_ptr", Type::fp32, turned(device, rotations));
    give_strides(launch, x, {"x_stride_b", "x_stride_h", "x_stride_n"});
    launch.integer("rotations_stride_h", of_heads > 1 ? rounds * columns * dim : 0);
    launch.integer("rotations_stride_r", columns * dim);
    launch.integer("n_heads", heads).integer("n_rows", n).integer("n_rounds", rounds).constant("HEAD_DIM", dim);
    int64_t first = 0, weight = 1;
    for (int64_t factor : factors) {
      launch.integer("first_column", first).integer("half", factor / 2).integer("weight", weight);
      launch.constant("IS_FIRST", weight == 1);
      const Variant& variant = device.choose(launch, {{"BLOCK_N", factor / 2}});
      device.run(variant, launch, {product({batch, heads, ceil_div(n, variant.block("BLOCK_M"))})});
      first += factor / 2;
      weight *= factor;
    }
  }

  // (H or 1, D, h, W) as (H or 1, h, W, D), so that directions are rows
  static const float* turned(Device& device, const Tensor& rotations) {
    const int64_t dim = rotations[1], rows = rotations[2] * rotations[3];
    float* made = static_cast<float*>(device.scratch(product({rotations.shape.count(), 4})));
    device.turn(rotations.as<float>(), made, rotations[0], dim, rows);
    return made;
  }
};

}  // namespace

Definition hash_argmax() {
  return {"HashArgmax",
          kEachT,
          {{"x"}, {"rotations", Port::fp32}},
          {{"buckets", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<HashArgmax>(attributes); },
          true};
}

}  // namespace fastattn
