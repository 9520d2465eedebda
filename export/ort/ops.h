// The ops of this library: what each is called, takes and gives, as the function bodies in export/ops/ have it.
#pragma once
#include "framework.h"

namespace fastattn {

Definition block_attention();
Definition block_attention_with_options();
Definition centroid_attention();
Definition cluster_sums();
Definition hamming_kmeans();
Definition hash_argmax();
Definition hash_bits();
Definition linear_attention();
Definition linear_attention_step();
Definition smyrf_hash();
Definition sorted_blocks();
Definition topk_attention();
Definition topk_keys();

}  // namespace fastattn
