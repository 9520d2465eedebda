// SMYRF's hashes of queries and keys, two launches a side: kernels/smyrf_hash.py.
#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

constexpr int64_t kLeastRows = 16;  // of a tile

class Hash {
 public:
  explicit Hash(const Context& context)
      : device_(context.device()), q_(context.input(0).expect({-1, -1, -1, -1})), batch_(q_[0]), heads_(q_[1]),
        dim_(q_[3]), k_(context.input(1).expect({batch_, -1, -1, dim_})),
        projections_(context.input(2).expect({dim_ + 2, -1})), rounds_(projections_[1]),
        query_mask_(context.input(3).expect({batch_, q_[2]})), key_mask_(context.input(4).expect({batch_, k_[2]})) {
    check_heads(heads_, k_[1]);
    check_lengths({q_[2], k_[2]});
    product_below(INT32_MAX, "numbers in projections", {projections_.shape.count()});
  }

  void run(const Context& context) {
    const Result q_hash(context, 0, {batch_, heads_, rounds_, q_[2]});
    const Result k_hash(context, 1, {batch_, heads_, rounds_, k_[2]});
    if (batch_ * heads_ * rounds_ == 0) return;
    directions_ = floats({rounds_, dim_ + 2});
    device_.turn(projections_.as<float>(), directions_, 1, dim_ + 2, rounds_);
    const Side queries = project(q_, query_mask_, q_hash.data()), keys = project(k_, key_mask_, k_hash.data());
    lift(queries, keys, dim_ + 1);
    lift(keys, queries, dim_);
  }

 private:
  // The products, [batch, heads, rounds, length], become the hashes. Of each tile of rows the largest square is kept.
  struct Side {
    int64_t length;
    float *products, *squares, *most;
    int64_t tiles;
  };

  float* floats(std::initializer_list<int64_t> sizes) const {
    return static_cast<float*>(device_.scratch(product({4, product(sizes)})));
  }

  Launch begin(const char* kernel, const Side& side) const {
    Launch launch(kernel);
    launch.pointer("products_ptr", Type::fp32, side.products).pointer("squares_ptr", Type::fp32, side.squares);
    launch.pointer("most_ptr", Type::fp32, side.most).pointer("directions_ptr", Type::fp32, directions_);
    // all heads share them
    launch.integer("directions_stride_b", 0).integer("directions_stride_h", 0);
    launch.integer("directions_stride_r", dim_ + 2).integer("n_heads", heads_);
    return launch.integer("n_rows", side.length).integer("n_rounds", rounds_);
  }

  Side project(const Tensor& x, const Tensor& mask, float* products) const {
    const int64_t length = x[2];
    Side side{length, products, floats({batch_, heads_, length}),
              floats({batch_, heads_, ceil_div(length, kLeastRows)}), 0};
    if (length == 0) return side;
    Launch launch = begin("smyrf_hash_project", side);
    launch.pointer("x_ptr", x.type, x.data).pointer("mask_ptr", mask.type, mask.data);
    give_strides(launch, x, {"x_stride_b", "x_stride_h", "x_stride_n"});
    launch.integer("group_size", heads_ / x[1]).constant("HEAD_DIM", dim_).constant("HAS_MASK", 1);
    const Variant& variant = device_.choose(launch, {});
    side.tiles = ceil_div(length, variant.block("BLOCK_M"));
    device_.run(variant, launch, {product({batch_, heads_, side.tiles})});
    return side;
  }

  // coordinate: that of the side's height in a direction
  void lift(const Side& side, const Side& other, int64_t coordinate) const {
    if (side.length == 0) return;
    Launch launch = begin("smyrf_hash_lift", side);
    launch.pointer("other_most_ptr", Type::fp32, other.most).pointer("hashes_ptr", Type::fp32, side.products);
    launch.integer("n_tiles", side.tiles).integer("n_other_tiles", other.tiles).integer("coordinate", coordinate);
    const Variant& variant = device_.choose(launch, {});
    device_.run(variant, launch, {product({batch_, heads_, ceil_div(side.length, variant.block("BLOCK_M"))})});
  }

  Device& device_;
  const Tensor q_;
  const int64_t batch_, heads_, dim_;
  const Tensor k_, projections_;
  const int64_t rounds_;
  const Tensor query_mask_, key_mask_;
  float* directions_ = nullptr;  // [rounds, dim + 2]: the projections turned
};

struct SmyrfHash : Node {
  void run(const Context& context) const override { Hash(context).run(context); }
};

}  // namespace

Definition smyrf_hash() {
  return {"SmyrfHash",
          kEachT,
          {{"q"}, {"k"}, {"projections", Port::fp32}, {"query_mask", Port::boolean}, {"key_mask", Port::boolean}},
          {{"q_hash", Port::fp32}, {"k_hash", Port::fp32}},
          [](const Attributes&) { return std::make_unique<SmyrfHash>(); },
          true};
}

}  // namespace fastattn
