// Each query attends to the key list of its cluster: kernels/topk_attention.py. Queries are sorted by cluster first.
#include <algorithm>

#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

struct TopkAttention : Node {
  bool is_causal;
  double scale;

  explicit TopkAttention(const Attributes& attributes)
      : is_causal(attributes.flag("is_causal")), scale(attributes.real("scale")) {}

  void run(const Context& context) const override {
    const Tensor q = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = q[0], heads = q[1], n = q[2], rows = batch * heads;
    const Tensor k = context.input(1).expect({batch, -1, -1, q[3]});
    const Tensor v = context.input(2).expect({batch, k[1], k[2], -1});
    check_heads(heads, k[1]);
    const Tensor clusters = context.input(3).expect({batch, heads, n});
    const Tensor lists = context.input(4).expect({batch, heads, -1, -1});
    const int64_t n_clusters = lists[2], top_k = lists[3];
    check_lengths({n, k[2], n_clusters, top_k});
    const Tensor mass = context.input(5).expect({batch, heads, n_clusters});
    const Tensor rest = context.input(6).expect({batch, heads, n_clusters, v[3]});
    Device& device = context.device();
    device.check_values("clusters", clusters.as<int32_t>(), clusters.shape.count(), -1, n_clusters - 1);
    device.check_values("topk_index", lists.as<int32_t>(), lists.shape.count(), -1, k[2] - 1);

    void* out = context.output(0, {batch, heads, n, v[3]});
    const Result lse(context, 1, {batch, heads, n});
    if (!out) out = device.scratch(product({rows, n, v[3], 4}));
    if (rows * n == 0) return;
    int32_t* order = static_cast<int32_t*>(device.scratch(product({rows, n, 4})));
    int32_t* offsets = static_cast<int32_t*>(device.scratch(product({rows, n_clusters + 1, 4})));
    device.sort_by_cluster(clusters.as<int32_t>(), rows, n, n_clusters, order, offsets);

    Launch launch("topk_attention_forward");
    launch.pointer("q_ptr", q.type, q.data).pointer("k_ptr", k.type, k.data).pointer("v_ptr", v.type, v.data);
    launch.pointer("order_ptr", Type::int32, order).pointer("offsets_ptr", Type::int32, offsets);
    launch.pointer("topk_index_ptr", Type::int32, lists.data).pointer("mass_ptr", Type::fp32, mass.data);
    launch.pointer("rest_ptr", Type::fp32, rest.data).pointer("seed_ptr", Type::int64, device.scratch(8));
    launch.pointer("out_ptr", q.type, out).pointer("lse_ptr", Type::fp32, lse.data());
    give_strides(launch, q, {"q_stride_b", "q_stride_h", "q_stride_n"});
    give_strides(launch, k, {"k_stride_b", "k_stride_h", "k_stride_n"});
    give_strides(launch, v, {"v_stride_b", "v_stride_h", "v_stride_n"});
    launch.integer("n_heads", heads).integer("group_size", heads / k[1]).integer("n_queries", n);
    launch.integer("n_clusters", n_clusters).integer("top_k", top_k).real("scale_log2", scale * kLog2E);
    launch.integer("drop_below", 0).real("keep_scale", 1).constant("HEAD_DIM", q[3]).constant("VALUE_DIM", v[3]);
    // as many as there are clusters, and none: the kernel looks at all of them at once
    launch.constant("BLOCK_C", power_of_two(n_clusters + 1));
    launch.constant("IS_CAUSAL", is_causal).constant("HAS_DROPOUT", 0).integer("n_tiles", 0);
    const Variant& variant = device.choose(launch, {{"BLOCK_N", top_k}});
    // full tiles, and one that is not for each cluster and for the queries of none
    const int64_t tiles = std::min(n, n / variant.block("BLOCK_M") + n_clusters + 1);
    launch.integer("n_tiles", tiles);
    device.run(variant, launch, {product({rows, tiles})});
  }
};

}  // namespace

Definition topk_attention() {
  return {"TopkAttention",
          kEachT,
          {{"q"}, {"k"}, {"v"}, {"clusters", Port::int32}, {"topk_index", Port::int32}, {"mass", Port::fp32},
           {"rest", Port::fp32}},
          {{"out"}, {"lse", Port::fp32}},
          [](const Attributes& attributes) { return std::make_unique<TopkAttention>(attributes); },
          true};
}

}  // namespace fastattn
