// Attention of a few queries to all keys, and the keys that each of them weighs most: kernels/centroid_attention.py.
//
// The kernel leaves, for each part of the keys, its own out and lse, and for each group of keys its largest logit, the
// peak: the largest logits of a query are in the groups of largest peaks, whose logits are looked at once more.
#include <algorithm>

#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

constexpr int64_t kGroup = 16, kPart = 2048;  // keys of a peak, and of a part

class CentroidAttention {
 public:
  CentroidAttention(const Context& context, bool has_values, int64_t top_k, double scale)
      : context_(context), device_(context.device()), has_values_(has_values), top_k_(top_k), scale_(scale),
        q_(context.input(0).expect({-1, -1, -1, -1})), batch_(q_[0]), heads_(q_[1]), queries_(q_[2]),
        k_(context.input(1).expect({batch_, -1, -1, q_[3]})), s_(k_[2]),
        v_(has_values ? context.input(2).expect({batch_, k_[1], s_, -1}) : k_),
        mask_(repeated(device_, context.input(has_values ? 3 : 2), {batch_, s_})), rows_(batch_ * heads_),
        parts_(ceil_div(s_, kPart)), groups_(ceil_div(s_, kGroup)) {
    check_heads(heads_, k_[1]);
    check_lengths({queries_, s_});
  }

  void run() {
    const int64_t value_dim = has_values_ ? v_[3] : 0, best = std::min(top_k_, s_);
    float* outs = floats({rows_, parts_, queries_, value_dim});
    float* lses = floats({rows_, parts_, queries_});
    float* peaks = floats({rows_, queries_, top_k_ ? groups_ : 0});
    if (rows_ * queries_ * s_ != 0) attend(outs, lses, peaks);
    if (has_values_) {
      const Shape rows{batch_, heads_, queries_};
      const Result out(context_, 0, {batch_, heads_, queries_, value_dim}), lse(context_, 1, rows);
      // the parts together are one softmax
      device_.fold(outs, lses, rows_, parts_, queries_, value_dim, out.data(), lse.data());
    }
    int32_t* index = static_cast<int32_t*>(
        context_.output(has_values_ ? 2 : 0, {batch_, heads_, queries_, best}));
    if (index && rows_ * queries_ * best != 0) find_largest(peaks, best, index);
  }

 private:
  float* floats(std::initializer_list<int64_t> sizes) const {
    return static_cast<float*>(device_.scratch(product({4, product(sizes)})));
  }

  int32_t* integers(std::initializer_list<int64_t> sizes) const {
    return static_cast<int32_t*>(device_.scratch(product({4, product(sizes)})));
  }

  Launch begin(const char* kernel) const {
    Launch launch(kernel);
    launch.pointer("q_ptr", q_.type, q_.data).pointer("k_ptr", k_.type, k_.data);
    launch.pointer("key_mask_ptr", mask_.type, mask_.data);
    give_strides(launch, k_, {"k_stride_b", "k_stride_h", "k_stride_n"});
    launch.integer("n_heads", heads_).integer("group_size", k_[1] ? heads_ / k_[1] : 1);
    launch.integer("n_queries", queries_).integer("n_keys", s_).real("scale_log2", scale_ * kLog2E);
    return launch.constant("HEAD_DIM", q_[3]).constant("HAS_MASK", 1);
  }

  void attend(float* outs, float* lses, float* peaks) const {
    Launch launch = begin("centroid_attention_forward");
    launch.pointer("v_ptr", v_.type, v_.data).pointer("seed_ptr", Type::int64, device_.scratch(8));  // of dropout
    launch.pointer("out_ptr", Type::fp32, outs).pointer("lse_ptr", Type::fp32, lses);
    launch.pointer("peaks_ptr", Type::fp32, peaks);
    give_strides(launch, v_, {"v_stride_b", "v_stride_h", "v_stride_n"});
    launch.integer("n_parts", parts_).integer("part_size", kPart).integer("n_groups", groups_);
    launch.integer("drop_below", 0).real("keep_scale", 1).constant("VALUE_DIM", v_[3]);
    launch.constant("HAS_VALUES", has_values_).constant("HAS_PEAKS", top_k_ > 0).constant("HAS_DROPOUT", 0);
    const Variant& variant = device_.choose(launch, {{"BLOCK_M", queries_}});
    device_.run(variant, launch, {product({rows_, parts_, ceil_div(queries_, variant.block("BLOCK_M"))})});
  }

  void find_largest(const float* peaks, int64_t best, int32_t* index) const {
    const int64_t n_chosen = std::min(top_k_, groups_), logits_each = n_chosen * kGroup;
    int32_t* chosen = integers({rows_, queries_, n_chosen});
    int32_t* places = integers({rows_, queries_, best});
    float* logits = floats({rows_, queries_, logits_each});
    device_.largest(peaks, rows_ * queries_, groups_, n_chosen, chosen);
    Launch launch = begin("centroid_attention_candidates");
    launch.pointer("groups_ptr", Type::int32, chosen).pointer("logits_ptr", Type::fp32, logits);
    launch.integer("n_chosen", n_chosen).integer("n_tiles", 0);
    const Variant& variant = device_.choose(launch, {});
    const int64_t tiles = ceil_div(logits_each, variant.block("BLOCK_N"));
    launch.integer("n_tiles", tiles);
    device_.run(variant, launch, {product({rows_, queries_, tiles})});
    device_.largest(logits, rows_ * queries_, logits_each, best, places);
    device_.listed_keys(places, chosen, logits, rows_ * queries_, best, n_chosen, kGroup, index);
  }

  const Context& context_;
  Device& device_;
  const bool has_values_;
  const int64_t top_k_;
  const double scale_;
  const Tensor q_;
  const int64_t batch_, heads_, queries_;
  const Tensor k_;
  const int64_t s_;
  const Tensor v_, mask_;
  const int64_t rows_, parts_, groups_;
};

struct Attend : Node {
  bool has_values;
  int64_t top_k;
  double scale;

  Attend(const Attributes& attributes, bool has_values)
      : has_values(has_values), top_k(attributes.integer("top_k", has_values ? 0 : 1)),
        scale(attributes.real("scale")) {}
  void run(const Context& context) const override { CentroidAttention(context, has_values, top_k, scale).run(); }
};

}  // namespace

Definition centroid_attention() {
  return {"CentroidAttention",
          kEachT,
          {{"q"}, {"k"}, {"v"}, {"key_mask", Port::boolean}},
          {{"out", Port::fp32}, {"lse", Port::fp32}, {"topk_index", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<Attend>(attributes, true); },
          true};
}

Definition topk_keys() {
  return {"TopkKeys",
          kEachT,
          {{"q"}, {"k"}, {"key_mask", Port::boolean}},
          {{"topk_index", Port::int32}},
          [](const Attributes& attributes) { return std::make_unique<Attend>(attributes, false); },
          true};
}

}  // namespace fastattn
