// Codes of random hyperplanes, and Lloyd's algorithm on them by Hamming distance: kernels/hamming.py.
#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

constexpr int64_t kMostClusters = 1 << 24;
constexpr int64_t kMostIterations = 1 << 16;  // a call can't be stopped: nobody means more

int64_t checked_bits(int64_t n_bits) {
  if (n_bits < 1 || n_bits > 63) throw Error("codes must have 1 to 63 bits, got " + std::to_string(n_bits));
  return n_bits;
}

struct HashBits : Node {
  void run(const Context& context) const override {
    const Tensor x = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = x[0], heads = x[1], n = x[2], dim = x[3];
    check_lengths({n});
    const Tensor planes = context.input(1).expect({-1, dim + 1});
    const int64_t n_bits = checked_bits(planes[0]);
    Device& device = context.device();
    void* codes = context.output(0, {batch, heads, n});
    if (!codes || batch * heads * n == 0) return;

    float* turned = static_cast<float*>(device.scratch(product({n_bits, dim + 1, 4})));  // [D + 1, n_bits]
    device.turn(planes.as<float>(), turned, 1, n_bits, dim + 1);
    Launch launch("hamming_hash");
    launch.pointer("x_ptr", x.type, x.data).pointer("planes_ptr", Type::fp32, turned);
    launch.pointer("codes_ptr", Type::int64, codes);
    give_strides(launch, x, {"x_stride_b", "x_stride_h", "x_stride_n"});
    launch.integer("n_heads", heads).integer("length", n).integer("n_bits", n_bits).constant("DIM", dim);
    const Variant& variant = device.choose(launch, {});
    device.run(variant, launch, {product({batch, heads, ceil_div(n, variant.block("BLOCK_M"))})});
  }
};

struct HammingKmeans : Node {
  int64_t n_bits, n_iterations;

  explicit HammingKmeans(const Attributes& attributes)
      : n_bits(checked_bits(attributes.integer("n_bits", 1))), n_iterations(attributes.integer("n_iterations", 1)) {
    product_below(kMostIterations, "iterations", {n_iterations});
  }

  void run(const Context& context) const override {
    const Tensor codes = context.input(0).expect({-1, -1, -1});
    const int64_t batch = codes[0], heads = codes[1], n = codes[2];
    const Tensor initial = context.input(1).expect({batch, heads, -1});
    const int64_t n_clusters = initial[2];
    check_lengths({n});
    if (n_clusters < 1 || n_clusters > kMostClusters)
      throw Error("initial must have 1 to 2^24 clusters, got " + std::to_string(n_clusters));
    Device& device = context.device();
    const Tensor mask = repeated(device, context.input(2), {batch, n});
    const Tensor seed = context.input(3).expect({});
    void* clusters = context.output(0, codes.shape);
    if (!clusters || batch * heads * n == 0) return;

    const int64_t rows = batch * heads;
    int32_t* centroids = static_cast<int32_t*>(device.scratch(product({rows, 2, n_clusters, 4})));
    int32_t* ranks = static_cast<int32_t*>(device.scratch(product({rows, n_clusters, 4})));
    device.first_centroids(codes.as<int64_t>(), initial.as<int32_t>(), rows, n, n_clusters, centroids, ranks);
    // the rows of a head that are counted apart: no results depend on how many
    const int64_t chunk = device.chunk(n), chunks = ceil_div(n, chunk);
    product_below(INT32_MAX, "bits of clusters", {chunks, n_clusters + 1, 64});
    void* counts = device.scratch(product({rows, chunks, n_clusters + 1, 64, 4}));

    Launch assign("hamming_assign"), count("hamming_count"), update("hamming_update");
    assign.pointer("codes_ptr", Type::int64, codes.data).pointer("centroids_ptr", Type::int32, centroids);
    assign.pointer("ranks_ptr", Type::int32, ranks).pointer("mask_ptr", mask.type, mask.data);
    assign.pointer("clusters_ptr", Type::int32, clusters).integer("n_heads", heads).integer("length", n);
    assign.integer("n_clusters", n_clusters).integer("n_bits", n_bits).constant("HAS_MASK", 1);
    count.pointer("codes_ptr", Type::int64, codes.data).pointer("clusters_ptr", Type::int32, clusters);
    count.pointer("counts_ptr", Type::int32, counts).integer("length", n).integer("n_clusters", n_clusters);
    count.integer("n_chunks", chunks).integer("chunk", chunk);
    update.pointer("counts_ptr", Type::int32, counts).pointer("seed_ptr", seed.type, seed.data);
    update.pointer("centroids_ptr", Type::int32, centroids).integer("n_clusters", n_clusters);
    update.integer("n_chunks", chunks).integer("n_bits", n_bits);
    const Variant& assigning = device.choose(assign, {{"BLOCK_C", n_clusters}});
    const Grid tiles{product({rows, ceil_div(n, assigning.block("BLOCK_N"))})};
    device.run(assigning, assign, tiles);
    for (int64_t iteration = 0; iteration + 1 < n_iterations; ++iteration) {
      update.integer("iteration", iteration);
      const Variant& counting = device.choose(count, {{"BLOCK_C", n_clusters}});
      const int64_t c_tiles = counting.block("SCATTER") ? 1 : ceil_div(n_clusters, counting.block("BLOCK_C"));
      device.run(counting, count, {product({rows, chunks, c_tiles})});
      const Variant& updating = device.choose(update, {{"BLOCK_C", n_clusters}});
      device.run(updating, update, {product({rows, ceil_div(n_clusters, updating.block("BLOCK_C"))})});
      device.run(assigning, assign, tiles);
    }
  }
};

}  // namespace

Definition hash_bits() {
  return {"HashBits",
          kEachT,
          {{"x"}, {"planes", Port::fp32}},
          {{"codes", Port::int64}},
          [](const Attributes&) { return std::make_unique<HashBits>(); },
          true};
}

Definition hamming_kmeans() {
  return {"HammingKmeans",
          kNoTypes,
          {{"codes", Port::int64}, {"initial", Port::int32}, {"mask", Port::boolean}, {"seed", Port::int64}},
          {{"clusters", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<HammingKmeans>(attributes); },
          true};
}

}  // namespace fastattn
