"""A patched model computes what it should: dense where it must, the method where it may, padding or not."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fastattn
from fastattn.integrations.transformers import DEFAULT_MIN_LENGTH

# on inputs as small as these the definition is quicker than a kernel that must be built first
SMALL = {"min_length": 0, "impl": "reference"}
FAMILIES = ["bert", "roberta", "distilbert", "electra", "albert", "eurobert", "nomic", "bart"]


def encoder(model, family):
    return model.encoder if family == "bart" else model


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cluster_is_dense_attention_on_a_padded_batch(build, batch, family):
    model = encoder(build(family), family)
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", n_hashes=1, q_cluster_size=64, **SMALL)
    real = batch["attention_mask"].bool()
    assert_close(hidden(model, **batch)[real], dense[real], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_each_example_gives_alone(build, batch, family):
    model = encoder(build(family), family)
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", n_hashes=2, q_cluster_size=8, **SMALL)
    together = hidden(model, **batch)
    alone = hidden(model, input_ids=batch["input_ids"][1:, :31])
    assert_close(together[1, :31], alone[0], atol=2e-6, rtol=2e-6)
    assert (together - dense)[0].abs().max() > 1e-3, "small clusters should be an approximation"


def test_a_model_without_masks_is_dense_with_one_cluster(build):
    model = build("vit")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense = hidden(model, pixel_values=pixels)
    with fastattn.patched(model, "smyrf", n_hashes=1, q_cluster_size=65, **SMALL):
        assert_close(hidden(model, pixel_values=pixels), dense, atol=2e-6, rtol=2e-6)
    with fastattn.patched(model, "smyrf", n_hashes=1, q_cluster_size=16, **SMALL):
        assert (hidden(model, pixel_values=pixels) - dense).abs().max() > 1e-3


def test_the_kernel_and_the_definition_agree_in_a_model(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", n_hashes=2, q_cluster_size=16, min_length=0)
    by_default = hidden(model, **batch)
    fastattn.patch(model, "smyrf", n_hashes=2, q_cluster_size=16, **SMALL)
    assert_close(by_default, hidden(model, **batch), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("min_length", "is_dense"), [(None, True), (51, True), (50, False), (0, False)])
def test_inputs_shorter_than_min_length_are_exactly_dense(build, batch, min_length, is_dense):
    assert DEFAULT_MIN_LENGTH > 50
    model = build("bert", "sdpa")
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", q_cluster_size=8, min_length=min_length, impl="reference")
    assert torch.equal(hidden(model, **batch), dense) == is_dense


@pytest.mark.parametrize("family", ["bert", "eurobert"])
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("improved_clustered", {"n_clusters": 3, "topk": 128}),
        ("smyrf", {"n_hashes": 2, "q_cluster_size": 16, "correct_duplicates": True, "local_window": 128}),
        ("smyrf", {"directions": "principal", "n_hashes": 2, "q_cluster_size": 128}),
    ],
)
def test_every_method_is_dense_attention_in_its_limit(build, batch, family, method, knobs):
    model = build(family)
    real = batch["attention_mask"].bool()
    dense = hidden(model, **batch)[real]
    fastattn.patch(model, method, **SMALL, **knobs)
    assert_close(hidden(model, **batch)[real], dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["clustered", "improved_clustered"])
def test_a_clustered_layer_keeps_its_draws(build, batch, method):
    model = build("bert")
    dense = hidden(model, **batch)
    few = {"n_clusters": 4, "n_bits": 8, "n_iterations": 3, **({"topk": 4} if "improved" in method else {}), **SMALL}
    fastattn.patch(model, method, seed=1, **few)
    once = hidden(model, **batch)
    assert torch.equal(hidden(model, **batch), once)
    assert (once - dense).abs().max() > 1e-3
    fastattn.patch(model, method, seed=2, **few)
    assert not torch.equal(hidden(model, **batch), once)


def test_layers_that_are_not_named_stay_dense(build, batch):
    model = build("bert", "sdpa")
    seen = []
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    hidden(model, **batch)
    fastattn.patch(model, "smyrf", layers=[-1], q_cluster_size=8, **SMALL)
    hidden(model, **batch)
    dense_first, dense_last, first, last = seen
    assert torch.equal(first, dense_first)
    assert (last - dense_last).abs().max() > 1e-3


def test_sliding_window_layers_keep_their_window(build, batch):
    model = build("modernbert")
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", layers=[0], n_hashes=1, q_cluster_size=64, **SMALL)
    real = batch["attention_mask"].bool()
    assert_close(hidden(model, **batch)[real], dense[real], atol=2e-6, rtol=2e-6)


def test_attention_is_zero_at_padded_positions(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", q_cluster_size=8, **SMALL)
    seen = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    hidden(model, **batch)
    padded = ~batch["attention_mask"].bool()
    assert (seen[0][padded] == 0).all()
    assert (seen[0][~padded] != 0).any(-1).all()


def test_an_example_of_nothing_but_padding_gives_no_nan(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", q_cluster_size=8, **SMALL)
    batch["attention_mask"][1] = 0
    assert hidden(model, **batch).isfinite().all()


def test_draws_come_from_the_seed_and_not_from_the_choice_of_layers(build, batch):
    def patched_draws(**options):
        model = build("bert")
        fastattn.patch(model, "smyrf", **options)
        return {n: b for n, b in model.named_buffers() if n.endswith("fastattn_draws")}

    first, again, other = patched_draws(), patched_draws(seed=0), patched_draws(seed=1)
    assert len(first) == 2 and all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    a, b = first.values()
    assert not torch.equal(a, b), "each layer draws its own"
    only_last = patched_draws(layers=[1])
    assert all(torch.equal(first[n], only_last[n]) for n in only_last) and len(only_last) == 1
    given = patched_draws(generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(given[n], other[n]) for n in given)


def test_gradients_reach_every_weight(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", q_cluster_size=8, **SMALL)
    model(**batch).last_hidden_state.sum().backward()
    queries = model.encoder.layer[0].attention.self.query.weight.grad
    assert queries is not None and queries.isfinite().all() and queries.abs().max() > 0


@pytest.mark.parametrize("min_length", [0, 1024])
def test_a_patched_model_compiles_without_graph_breaks(build, batch, min_length):
    model = build("bert")
    fastattn.patch(model, "smyrf", q_cluster_size=16, min_length=min_length)
    eager = hidden(model, **batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(hidden(compiled, **batch), eager, atol=2e-6, rtol=2e-6)
