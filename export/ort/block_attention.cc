// Blocks of gathered queries attend to blocks of gathered keys, a launch a round: kernels/block_attention.py.
#include <algorithm>
#include <limits>

#include "heads.h"
#include "ops.h"

namespace fastattn {
namespace {

constexpr int32_t kFar = 1 << 29;  // blocks away: farther than any window reaches, and twice as far still fits 32 bits
constexpr int64_t kMostSteps = std::numeric_limits<int32_t>::max();

enum SelfMode : int64_t { kAttend = 0, kExclude = 1, kLastResort = 2, kOnce = 3 };

// Which keys a query meets beside those of its block, and the inputs that say more of it; those that are not given are
// of options that are off.
struct Options {
  int64_t look_back = 0, look_ahead = 0;
  bool wrap = true, is_causal = false, correct_duplicates = false;
  int64_t self_mode = kAttend;
  Tensor local_q_index{}, local_k_index{}, q_bucket{}, k_bucket{}, n_used_blocks{}, own_mask{};
};

class BlockAttention {
 public:
  BlockAttention(const Context& context, double scale)
      : device_(context.device()), scale_(scale), q_(context.input(0).expect({-1, -1, -1, -1})), batch_(q_[0]),
        heads_(q_[1]), n_(q_[2]), k_(context.input(1).expect({batch_, -1, -1, q_[3]})), s_(k_[2]),
        v_(context.input(2).expect({batch_, k_[1], s_, -1})),
        q_index_(context.input(3).expect({batch_, heads_, -1, -1, -1})), rounds_(q_index_[2]),
        k_index_(context.input(4).expect({batch_, heads_, rounds_, q_index_[3], -1})),
        out_(context, 0, {batch_, heads_, n_, v_[3]}), lse_(context, 1, {batch_, heads_, n_}) {
    check_heads(heads_, k_[1]);
    check_lengths({n_, s_});
    product_below(kMostSteps, "rounds of blocks", {rounds_, q_index_[3]});
  }

  void run(const Options& options) {
    check(options);
    // what rows in no block have
    device_.fill(out_.data(), 0, out_.count());
    device_.fill(lse_.data(), -std::numeric_limits<float>::infinity(), lse_.count());
    Launch launch = begin("block_attention_forward");
    launch.integer("n_keys", s_).integer("n_rounds", rounds_).integer("n_blocks", q_index_[3]);
    launch.integer("look_back", options.look_back).integer("look_ahead", options.look_ahead);
    launch.real("scale_log2", scale_ * kLog2E);
    launch.constant("IS_CAUSAL", options.is_causal).constant("EXCLUDE_SELF", options.self_mode != kAttend);
    launch.constant("WRAP", options.wrap).constant("OWN_KEY", options.self_mode >= kLastResort);
    give(launch, "n_used_blocks_ptr", options.n_used_blocks);
    give(launch, "q_bucket_ptr", options.q_bucket);
    give(launch, "k_bucket_ptr", options.k_bucket);
    if (options.correct_duplicates) {
      launch.pointer("q_block_ptr", Type::int32, numbers(q_index_, n_, kFar));
      launch.pointer("k_block_ptr", Type::int32, numbers(k_index_, s_, -kFar));
    }
    launch.pointer("q_index_ptr", Type::int32, q_index_.data).pointer("k_index_ptr", Type::int32, k_index_.data);
    for (int64_t round = 0; round < rounds_; ++round) {
      launch.constant("IS_FIRST", round == 0);
      run_round(launch, round, q_index_, k_index_);
    }
    if (options.local_q_index.is_given) {
      launch.pointer("q_index_ptr", Type::int32, nullptr).pointer("k_index_ptr", Type::int32, nullptr);
      give(launch, "local_index_q_ptr", options.local_q_index);
      give(launch, "local_index_k_ptr", options.local_k_index);
      launch.integer("n_local_blocks", options.local_q_index[3]).constant("IS_FIRST", 0);
      run_round(launch, rounds_, options.local_q_index, options.local_k_index);
    }
    if (options.self_mode >= kLastResort) own_keys(options);
    out_.finish();
    lse_.finish();
  }

  const Tensor& q() const { return q_; }
  const Tensor& k() const { return k_; }
  const Tensor& q_index() const { return q_index_; }

 private:
  void check(const Options& options) const {
    check_rows(q_index_, n_);
    check_rows(k_index_, s_);
    if (options.n_used_blocks.is_given)
      device_.check_values("n_used_blocks", options.n_used_blocks.as<int32_t>(), batch_, 1, q_index_[3]);
    if (options.local_q_index.is_given) {
      options.local_q_index.expect({batch_, heads_, 1, -1, -1});
      options.local_k_index.expect({batch_, heads_, 1, options.local_q_index[3], -1});
      check_rows(options.local_q_index, n_);
      check_rows(options.local_k_index, s_);
    }
    if (options.self_mode >= kLastResort && n_ != s_)
      throw Error("self_mode 2 and 3 need as many keys as queries, got " + std::to_string(n_) + " queries and " +
                  std::to_string(s_) + " keys");
    // the kernel counts a program's steps in 32 bits
    product_below(kMostSteps, "keys in a window",
                  {1 + options.look_back + options.look_ahead, std::max<int64_t>(1, k_index_[4])});
  }

  void check_rows(const Tensor& index, int64_t length) const {
    device_.check_values(index.name, index.as<int32_t>(), index.shape.count(), -1, length - 1);
  }

  Launch begin(const char* kernel) const {
    Launch launch(kernel);
    launch.pointer("q_ptr", q_.type, q_.data).pointer("k_ptr", k_.type, k_.data).pointer("v_ptr", v_.type, v_.data);
    launch.pointer("out_ptr", Type::fp32, out_.data()).pointer("lse_ptr", Type::fp32, lse_.data());
    give_strides(launch, q_, {"q_stride_b", "q_stride_h", "q_stride_n"});
    give_strides(launch, k_, {"k_stride_b", "k_stride_h", "k_stride_n"});
    give_strides(launch, v_, {"v_stride_b", "v_stride_h", "v_stride_n"});
    launch.integer("n_heads", heads_).integer("group_size", k_[1] ? heads_ / k_[1] : 1).integer("n_queries", n_);
    return launch.constant("HEAD_DIM", q_[3]).constant("VALUE_DIM", v_[3]);
  }

  void give(Launch& launch, std::string_view name, const Tensor& tensor) const {
    if (tensor.is_given) launch.pointer(name, tensor.type, tensor.data);
  }

  const int32_t* numbers(const Tensor& index, int64_t length, int32_t absent) const {
    int32_t* made = static_cast<int32_t*>(device_.scratch(4 * product({batch_, heads_, rounds_, length})));
    device_.block_numbers(index.as<int32_t>(), batch_ * heads_ * rounds_, index[3], index[4], length, absent, made);
    return made;
  }

  void run_round(Launch& launch, int64_t round, const Tensor& q_index, const Tensor& k_index) const {
    const int64_t blocks = q_index[3], c_q = q_index[4], c_k = k_index[4];
    if (out_.count() == 0 || q_index.shape.count() == 0) return;
    launch.integer("round_id", round).integer("c_q", c_q).integer("c_k", c_k);
    const Variant& variant = device_.choose(launch, {{"BLOCK_M", c_q}, {"BLOCK_N", c_k}});
    device_.run(variant, launch, {product({batch_, heads_, blocks, ceil_div(c_q, variant.block("BLOCK_M"))})});
  }

  void own_keys(const Options& options) const {
    if (out_.count() == 0) return;
    Launch launch = begin("block_attention_own_key_forward");
    give(launch, "own_mask_ptr", options.own_mask);
    launch.integer("n_draws", rounds_ + options.local_q_index.is_given).real("scale", scale_);
    launch.constant("LAST_RESORT", options.self_mode == kLastResort);
    const Variant& variant = device_.choose(launch, {{"BLOCK_M", n_}});
    device_.run(variant, launch, {product({batch_, heads_, ceil_div(n_, variant.block("BLOCK_M"))})});
  }

  Device& device_;
  const double scale_;
  const Tensor q_;
  const int64_t batch_, heads_, n_;
  const Tensor k_;
  const int64_t s_;
  const Tensor v_, q_index_;
  const int64_t rounds_;
  const Tensor k_index_;
  const Result out_, lse_;
};

struct Plain : Node {
  double scale;

  explicit Plain(const Attributes& attributes) : scale(attributes.real("scale")) {}
  void run(const Context& context) const override { BlockAttention(context, scale).run({}); }
};

struct WithOptions : Node {
  double scale;
  Options options;
  bool across_buckets;

  explicit WithOptions(const Attributes& attributes) : scale(attributes.real("scale")) {
    options.look_back = attributes.integer("look_back", 0);
    options.look_ahead = attributes.integer("look_ahead", 0);
    options.wrap = attributes.flag("wrap");
    options.is_causal = attributes.flag("is_causal");
    options.correct_duplicates = attributes.flag("correct_duplicates");
    options.self_mode = attributes.integer("self_mode", kAttend);
    if (options.self_mode > kOnce) throw Error("self_mode must be at most 3");
    across_buckets = attributes.flag("across_buckets");
    product_below(kMostSteps, "blocks of a window", {options.look_back, 1});
    product_below(kMostSteps, "blocks of a window", {options.look_ahead, 1});
  }

  void run(const Context& context) const override {
    BlockAttention attention(context, scale);
    const int64_t batch = attention.q()[0], heads = attention.q()[1], n = attention.q()[2], s = attention.k()[2];
    const int64_t rounds = attention.q_index()[2];
    Device& device = context.device();
    Options own = options;
    own.local_q_index = context.input(5);
    own.local_k_index = context.input(6);
    // no local round is one place, for all heads or for each, that holds no row
    const Tensor& local = own.local_q_index;
    const bool is_one_place = local.shape.rank() == 5 && local[3] == 1 && local[4] == 1;
    const bool is_of_heads = local.shape.count() == batch * heads;
    if (is_one_place && (!is_of_heads || device.are_none(local.as<int32_t>(), batch * heads)))
      own.local_q_index.is_given = own.local_k_index.is_given = false;
    if (!across_buckets) {
      own.q_bucket = context.input(7).expect({batch, heads, rounds, n});
      own.k_bucket = context.input(8).expect({batch, heads, rounds, s});
    }
    own.n_used_blocks = repeated(device, context.input(9), {batch});
    if (own.self_mode >= kLastResort) own.own_mask = repeated(device, context.input(10), {batch, n});
    attention.run(own);
  }
};

}  // namespace

Definition block_attention() {
  return {"BlockAttention",
          kEachT,
          {{"q"}, {"k"}, {"v"}, {"q_index", Port::int32}, {"k_index", Port::int32}},
          {{"out"}, {"lse", Port::fp32}},
          [](const Attributes& attributes) { return std::make_unique<Plain>(attributes); },
          true};
}

Definition block_attention_with_options() {
  return {"BlockAttentionWithOptions",
          kEachT,
          {{"q"}, {"k"}, {"v"}, {"q_index", Port::int32}, {"k_index", Port::int32}, {"local_q_index", Port::int32},
           {"local_k_index", Port::int32}, {"q_bucket", Port::int32}, {"k_bucket", Port::int32},
           {"n_used_blocks", Port::int32}, {"own_mask", Port::boolean}},
          {{"out"}, {"lse", Port::fp32}},
          [](const Attributes& attributes) { return std::make_unique<WithOptions>(attributes); },
          true};
}

}  // namespace fastattn
