// Linear attention: states of chunks of keys, their running sums, and outputs: kernels/linear_attention.py. And one
// token of it: kernels/linear_attention_step.py.
#include <algorithm>

#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

const char* const kFeatureMaps[] = {"elu", "relu", "relu2", "identity"};

const char* feature_map(const Attributes& attributes) {
  const int64_t number = attributes.integer("feature_map", 0);
  if (number > 3) throw Error("feature_map must be at most 3, got " + std::to_string(number));
  return kFeatureMaps[number];
}

struct LinearAttention : Node {
  const char* map;
  bool is_causal;
  double eps;

  explicit LinearAttention(const Attributes& attributes)
      : map(feature_map(attributes)), is_causal(attributes.flag("is_causal")), eps(attributes.real("eps")) {}

  void run(const Context& context) const override {
    const Tensor q = context.input(0).expect({-1, -1, -1, -1});
    const int64_t batch = q[0], heads = q[1], n = q[2], features = q[3];
    const Tensor k = context.input(1).expect({batch, -1, -1, features});
    const int64_t kv_heads = k[1], s = k[2];
    const Tensor v = context.input(2).expect({batch, kv_heads, s, -1});
    const int64_t value_dim = v[3];
    check_heads(heads, kv_heads);
    check_lengths({n, s});
    if (is_causal && n != s)
      throw Error("is_causal needs as many keys as queries, got " + std::to_string(n) + " and " + std::to_string(s));
    Device& device = context.device();
    const int64_t size = product({features, value_dim + 1});
    const Tensor mask = repeated(device, context.input(3), {batch, s});
    const Tensor given = context.input(4);
    if (given.shape != Shape{1, 1, 1}) given.expect({batch, heads, size});

    const auto floats = [&](std::initializer_list<int64_t> sizes) {
      return static_cast<float*>(device.scratch(product({4, product(sizes)})));
    };
    void* out = context.output(0, {batch, heads, n, value_dim});
    const Result den(context, 1, {batch, heads, n}), state(context, 2, {batch, heads, size});
    if (!out) out = floats({batch, heads, n, value_dim});
    const float* initial = given.as<float>();
    if (given.shape == Shape{1, 1, 1}) {
      float* nothing = floats({batch, heads, size});
      device.fill(nothing, 0, batch * heads * size);
      initial = nothing;
    }
    if (batch * heads == 0) return;

    const bool is_narrow = v.type == Type::fp16 && q.type == v.type && map != kFeatureMaps[2];
    Launch outputs("linear_attention_outputs");
    outputs.pointer("own_x_ptr", q.type, q.data).pointer("result_ptr", v.type, out);
    give_keys(outputs, k, v, mask);
    outputs.pointer("den_ptr", Type::fp32, den.data()).pointer("before_ptr", Type::fp32, state.data());
    give_strides(outputs, q, {"own_x_stride_b", "own_x_stride_h", "own_x_stride_n"});
    outputs.integer("n_heads", heads).integer("own_group", 1).integer("other_group", heads / kv_heads);
    outputs.integer("n_own", n).integer("n_other", s).integer("n_chunks", 0);
    outputs.real("eps", eps);
    give_flags(outputs, features, value_dim, is_narrow);
    outputs.constant("IS_CAUSAL", is_causal).constant("OWN_MASK", 0);
    const Variant& last = device.choose(outputs, {});

    // rows of a state: a tile of the rows that meet it, or as many as keep all cores at work
    int64_t chunk = 512;
    if (is_causal) chunk = last.block("BLOCK_M");
    else
      while (chunk < ceil_div(s, 64)) chunk *= 2;
    const int64_t chunks = ceil_div(s, chunk);
    float* states = floats({batch, kv_heads, chunks, size});
    float* before = !is_causal ? state.data() : heads == kv_heads ? states : floats({batch, heads, chunks, size});

    Launch sums("linear_attention_states");
    give_keys(sums, k, v, mask);
    // no gradients: what the forward does not read
    sums.pointer("den_ptr", Type::fp32, den.data()).pointer("delta_ptr", Type::fp32, state.data());
    sums.pointer("states_ptr", Type::fp32, states);
    sums.integer("n_other_heads", kv_heads).integer("n_other", s).integer("n_chunks", chunks).integer("chunk", chunk);
    give_flags(sums, features, value_dim, is_narrow);
    const Variant& first = device.choose(sums, {});
    device.run(first, sums, {product({batch, kv_heads, chunks, ceil_div(features, first.block("BLOCK_F")),
                                      ceil_div(value_dim, first.block("BLOCK_DV"))})});

    Launch scan("linear_attention_scan");
    scan.pointer("states_ptr", Type::fp32, states).pointer("initial_ptr", Type::fp32, initial);
    scan.pointer("before_ptr", Type::fp32, before).pointer("final_ptr", Type::fp32, state.data());
    scan.integer("n_heads", heads).integer("group_size", heads / kv_heads);
    scan.integer("n_chunks", chunks).integer("size", size);
    scan.constant("HAS_INITIAL", 1).constant("KEEPS_BEFORE", is_causal).constant("OWN_KEYS", 0);
    const Variant& middle = device.choose(scan, {});
    device.run(middle, scan, {product({batch, heads, ceil_div(size, middle.block("BLOCK_SIZE"))})});

    outputs.pointer("before_ptr", Type::fp32, before).integer("n_chunks", chunks);
    device.run(last, outputs, {product({batch, heads, ceil_div(n, last.block("BLOCK_M")),
                                        ceil_div(value_dim, last.block("BLOCK_DV"))})});
  }

  static void give_keys(Launch& launch, const Tensor& k, const Tensor& v, const Tensor& mask) {
    launch.pointer("other_x_ptr", k.type, k.data).pointer("other_y_ptr", v.type, v.data);
    launch.pointer("key_mask_ptr", mask.type, mask.data);
    give_strides(launch, k, {"other_x_stride_b", "other_x_stride_h", "other_x_stride_n"});
    give_strides(launch, v, {"other_y_stride_b", "other_y_stride_h", "other_y_stride_n"});
  }

  void give_flags(Launch& launch, int64_t features, int64_t value_dim, bool is_narrow) const {
    launch.constant("FEATURES", features).constant("VALUE_DIM", value_dim).constant("FEATURE_MAP", map);
    launch.constant("OWN_KEYS", 0).constant("OTHER_MASK", 1);
    launch.constant("NARROW", is_narrow).constant("NARROW_SUMS", 0);  // fp16 has no room for sums over keys
  }
};

struct Step : Node {
  const char* map;
  double eps;

  explicit Step(const Attributes& attributes) : map(feature_map(attributes)), eps(attributes.real("eps")) {}

  void run(const Context& context) const override {
    const Tensor q = context.input(0).expect({-1, -1, 1, -1});
    const int64_t batch = q[0], heads = q[1], features = q[3];
    const Tensor k = context.input(1).expect({batch, -1, 1, features});
    const Tensor v = context.input(2).expect({batch, k[1], 1, -1});
    const int64_t value_dim = v[3];
    check_heads(heads, k[1]);
    const Tensor s = context.input(3).expect({batch, heads, features, value_dim});
    const Tensor z = context.input(4).expect({batch, heads, features});
    Device& device = context.device();
    void* out = context.output(0, {batch, heads, 1, value_dim});
    const Result new_s(context, 1, s.shape), new_z(context, 2, z.shape);
    if (!out) out = device.scratch(product({batch, heads, value_dim, 4}));
    if (batch * heads == 0) return;

    Launch launch("linear_attention_step");
    launch.pointer("q_ptr", q.type, q.data).pointer("k_ptr", k.type, k.data).pointer("v_ptr", v.type, v.data);
    launch.pointer("s_ptr", s.type, s.data).pointer("z_ptr", z.type, z.data).pointer("out_ptr", v.type, out);
    launch.pointer("new_s_ptr", Type::fp32, new_s.data()).pointer("new_z_ptr", Type::fp32, new_z.data());
    give_strides(launch, q, {"q_stride_b", "q_stride_h"});
    give_strides(launch, k, {"k_stride_b", "k_stride_h"});
    give_strides(launch, v, {"v_stride_b", "v_stride_h"});
    give_strides(launch, s, {"s_stride_b", "s_stride_h"});
    give_strides(launch, z, {"z_stride_b", "z_stride_h"});
    launch.integer("n_heads", heads).integer("group_size", heads / k[1]).real("eps", eps);
    launch.constant("FEATURES", features).constant("VALUE_DIM", value_dim).constant("FEATURE_MAP", map);
    const Variant& variant = device.choose(launch, {});
    device.run(variant, launch, {product({batch, heads, ceil_div(value_dim, variant.block("BLOCK_DV"))})});
  }
};

}  // namespace

Definition linear_attention() {
  return {"LinearAttention",
          kEachTandU,
          {{"q"}, {"k"}, {"v", Port::U}, {"key_mask", Port::boolean}, {"initial", Port::fp32}},
          {{"out", Port::U}, {"den", Port::fp32}, {"state", Port::fp32}},
          [](const Attributes& attributes) { return std::make_unique<LinearAttention>(attributes); },
          true};
}

Definition linear_attention_step() {
  return {"LinearAttentionStep",
          kEachTandU,
          {{"q"}, {"k"}, {"v", Port::U}, {"s", Port::fp32}, {"z", Port::fp32}},
          {{"out", Port::U}, {"new_s", Port::fp32}, {"new_z", Port::fp32}},
          [](const Attributes& attributes) { return std::make_unique<Step>(attributes); },
          true};
}

}  // namespace fastattn
