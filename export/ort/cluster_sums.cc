// The sums over the members of each cluster: kernels/cluster_attention.py, and the sum of its chunks.
#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

struct ClusterSums : Node {
  int64_t n_clusters;

  explicit ClusterSums(const Attributes& attributes) : n_clusters(attributes.integer("n_clusters", 1)) {}

  void run(const Context& context) const override {
    const Tensor x = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = x[0], heads = x[1], n = x[2], dim = x[3], rows = batch * heads;
    check_lengths({n, n_clusters});
    product_below(INT32_MAX, "numbers in sums", {n_clusters + 1, dim});
    const Tensor clusters = context.input(1).expect({batch, heads, n});
    Device& device = context.device();
    device.check_values("clusters", clusters.as<int32_t>(), clusters.shape.count(), -1, n_clusters - 1);
    const Result sums(context, 0, {batch, heads, n_clusters, dim});
    int32_t* counts = static_cast<int32_t*>(context.output(1, {batch, heads, n_clusters}));
    if (!counts) counts = static_cast<int32_t*>(device.scratch(product({rows, n_clusters, 4})));

    const int64_t chunk = device.chunk(n), chunks = ceil_div(n, chunk);
    const int64_t each = n_clusters + 1;  // and what takes the rows of none
    void* part_sums = device.scratch(product({rows, chunks, each, dim, 4}));
    void* part_counts = device.scratch(product({rows, chunks, each, 4}));
    Launch launch("cluster_attention_sums");
    launch.pointer("x_ptr", x.type, x.data).pointer("clusters_ptr", Type::int32, clusters.data);
    launch.pointer("sums_ptr", Type::fp32, part_sums).pointer("counts_ptr", Type::int32, part_counts);
    give_strides(launch, x, {"x_stride_b", "x_stride_h", "x_stride_n"});
    launch.integer("n_heads", heads).integer("length", n).integer("n_clusters", n_clusters);
    launch.integer("n_chunks", chunks).integer("chunk", chunk).constant("DIM", dim);
    if (rows * n != 0) {
      const Variant& variant = device.choose(launch, {});
      const int64_t tiles = variant.block("SCATTER") ? 1 : ceil_div(n_clusters, variant.block("BLOCK_C"));
      device.run(variant, launch, {product({rows, chunks, tiles})});
    }
    device.sum_parts(Type::fp32, part_sums, rows, chunks, n_clusters * dim, each * dim, sums.data());
    device.sum_parts(Type::int32, part_counts, rows, chunks, n_clusters, each, counts);
  }
};

}  // namespace

Definition cluster_sums() {
  return {"ClusterSums",
          kEachT,
          {{"x"}, {"clusters", Port::int32}},
          {{"sums", Port::fp32}, {"counts", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<ClusterSums>(attributes); },
          true};
}

}  // namespace fastattn
