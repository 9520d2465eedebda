"""A million tokens through attention on this machine, in one command: ``make million``, or ``python -m perf.million``.

1,048,576 tokens, 8 heads of 64, fp32, forward. Prints time by stage and the process's peak memory, and checks rows
drawn at random against the definition in float64, so that what was timed is known to be right. Dense attention of this
length does 2.3e15 multiplications and additions: hours, where this takes seconds.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.kernels.cpu import machine
from fastattn.methods import smyrf_routing
from fastattn.methods.clustered import assign_clusters
from fastattn.methods.reformer import default_factors
from fastattn.ops.hash_argmax import hash_argmax

HEADS, HEAD_DIM = 8, 64
ROUNDS, CLUSTER = 4, 64
N_CLUSTERS, N_BITS = 100, 63
SECONDS_GOAL, MEMORY_GOAL = 20.0, 16e9
CHECKED_ROWS = 64  # of each head
TOLERANCE = 1e-4  # of the largest value: fp32's rounding stays below, a wrong or missing key does not


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.million", description="A million tokens on this machine.")
    parser.add_argument("--method", choices=[*METHODS], default="smyrf", help="4 rounds of 64, or 100 clusters")
    parser.add_argument("--tokens", type=int, default=2**20, help="default: 2^20")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2, which the goal is for)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    length = chosen.tokens
    print(f"{machine.model_name()}, {chosen.threads} threads, torch {torch.__version__}")

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
    print(f"{length:,} tokens, H={HEADS}, D={HEAD_DIM}, fp32: drawn in {time.perf_counter() - start:.1f} s")

    attention, check = METHODS[chosen.method](length, generator)
    with torch.inference_mode(), Stages():
        attention(*(x[:, :, : 4 * N_CLUSTERS] for x in (q, k, v)))  # builds or loads the kernels
    with torch.inference_mode(), Stages() as stages:
        start = time.perf_counter()
        out = attention(q, k, v)
        seconds = time.perf_counter() - start
    peak = peak_memory()
    print(f"{chosen.method} forward: {seconds:.2f} s")
    for name, spent in stages.longest():
        print(f"  {spent:6.2f} s  {name}")
    print(f"peak memory of the process, inputs and result included: {peak / 1e9:.1f} GB")

    start = time.perf_counter()
    worst = check(q, k, v, out)
    print(f"rows checked: {worst}, in {time.perf_counter() - start:.1f} s")
    if chosen.tokens >= 2**20 and chosen.method == "smyrf":
        within = seconds <= SECONDS_GOAL and peak <= MEMORY_GOAL
        print(f"goal, {SECONDS_GOAL:.0f} s and {MEMORY_GOAL / 1e9:.0f} GB: {'reached' if within else 'missed'}")


def peak_memory() -> float:
    """Most bytes that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stages(TorchDispatchMode):
    """Adds up how long each op took while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[str(func)] += time.perf_counter() - start
        return result

    def longest(self) -> list[tuple[str, float]]:
        """Ops and seconds, longest first; all below a hundredth of the whole as one."""
        total = sum(self.seconds.values())
        shown = sorted(((n, s) for n, s in self.seconds.items() if s >= total / 100), key=lambda stage: -stage[1])
        return [*shown, ("all others", total - sum(seconds for _, seconds in shown))]


Check = Callable[[Tensor, Tensor, Tensor, Tensor], str]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
KeysOf = Callable[[int], Callable[[int], Tensor]]  # head -> row -> the keys that it met


def _smyrf(length: int, generator: torch.Generator) -> tuple[Attention, Check]:
    projections = torch.randn(HEAD_DIM + 2, ROUNDS, generator=generator)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fastattn.smyrf_attention(q, k, v, n_hashes=ROUNDS, q_cluster_size=CLUSTER, projections=projections)
        assert isinstance(out, Tensor)
        return out

    def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str:
        clusters = smyrf_routing.plan(q.shape[2], k.shape[2], CLUSTER, None, True)
        q_index, k_index = smyrf_routing.route(q, k, projections, ROUNDS, None, None, clusters)
        check_order(q, k, projections, q_index, k_index, generator)

        def keys_of(head: int) -> Callable[[int], Tensor]:
            at = _places(q_index[0, head].flatten(1))
            return lambda row: k_index[0, head, torch.arange(ROUNDS), at[:, row] // CLUSTER].flatten()

        return _check_rows(q, k, v, out, keys_of, generator)

    return attention, check


def check_order(
    q: Tensor, k: Tensor, projections: Tensor, q_index: Tensor, k_index: Tensor, generator: torch.Generator
) -> None:
    """Rows stand in the order of their hashes, in float64, up to rounding: from each drawn cluster to the next."""
    q_square, k_square = (torch.cat([(y.double() ** 2).sum(-1) for y in x[0, 0].split(2**16)]) for x in (q, k))
    radius = q_square.max() + k_square.max()
    alpha = projections.double()
    for x, square, index, height in ((q, q_square, q_index, alpha[-1]), (k, k_square, k_index, alpha[-2])):
        for block in torch.randint(index.shape[3] - 1, (CHECKED_ROWS,), generator=generator).tolist():
            for turn in range(ROUNDS):
                rows = index[0, 0, turn, block : block + 2].long()
                hashes = x[0, 0, rows].double() @ alpha[:-2, turn] + (radius - square[rows]).sqrt() * height[turn]
                if not hashes[0].max() <= hashes[1].min() + 1e-4:
                    raise RuntimeError(f"cluster {block} of round {turn} is not in the order of its hashes")


def _places(order: Tensor) -> Tensor:
    """The inverse of each row of order (rounds, N), which must be a permutation."""
    at = torch.full(order.shape, -1)
    at.scatter_(1, order.long(), torch.arange(order.shape[1]).expand(order.shape))
    if (at < 0).any():
        raise RuntimeError("a round left rows out")
    return at


def _check_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, keys_of: KeysOf, generator: torch.Generator, unit_keys: bool = False
) -> str:
    """Each drawn row is the softmax, in float64, over the keys that it met."""
    worst = 0.0
    for head in range(HEADS):
        met = keys_of(head)
        for row in torch.randint(q.shape[2], (CHECKED_ROWS,), generator=generator).tolist():
            rows = met(row).long()
            keys = k[0, head, rows].double()
            if unit_keys:
                keys = torch.nn.functional.normalize(keys, dim=-1)
            logits = keys @ q[0, head, row].double() / HEAD_DIM**0.5
            worst = max(worst, _off(out[0, head, row], logits.softmax(0) @ v[0, head, rows].double()))
    return _verdict(worst, HEADS * CHECKED_ROWS)


def _lsh(length: int, generator: torch.Generator) -> tuple[Attention, Check]:
    """Causal, one block back. The hash itself is the kernel's, for rows between two buckets may fall into either."""
    factors = default_factors(length, CLUSTER)
    rotations = torch.randn(1, HEAD_DIM, ROUNDS, sum(factors) // 2, generator=generator)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.lsh_attention(
            q, v, n_hashes=ROUNDS, bucket_size=CLUSTER, n_buckets=factors, rotations=rotations, is_causal=True
        )

    def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str:
        buckets = hash_argmax(q, rotations, factors)

        def keys_of(head: int) -> Callable[[int], Tensor]:
            order = buckets[0, head].sort(dim=-1, stable=True).indices
            at = _places(order)
            blocks = order.view(-1, CLUSTER)  # of all rounds, one after the other

            def met(row: int) -> Tensor:
                own = at[:, row] // CLUSTER + torch.arange(ROUNDS) * (length // CLUSTER)
                keys = blocks[torch.cat([own, own - 1])].flatten()  # block -1 is the last round's last
                keys = keys[keys < row]
                return keys if len(keys) else torch.tensor([row])

            return met

        return _check_rows(q, q, v, out, keys_of, generator, unit_keys=True)

    return attention, check


def _clustered(length: int, generator: torch.Generator) -> tuple[Attention, Check]:
    knobs: dict[str, Any] = {"n_clusters": N_CLUSTERS, "n_bits": N_BITS, "n_iterations": 10}
    planes = torch.randn(N_BITS, HEAD_DIM + 1, generator=generator)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.clustered_attention(q, k, v, planes=planes, generator=seeded(), **knobs)

    def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str:
        clusters = assign_clusters(
            q, planes=planes, query_mask=None, initial_centroids=None, clusters=None, generator=seeded(), **knobs
        )
        worst = 0.0
        for head in range(HEADS):
            keys, values = k[0, head].double(), v[0, head].double()
            for row in torch.randint(length, (2,), generator=generator).tolist():
                members = (clusters[0, head] == clusters[0, head, row]).nonzero()[:, 0]
                centroid = q[0, head, members].double().mean(0)
                exact = (keys @ centroid / HEAD_DIM**0.5).softmax(0) @ values
                worst = max(worst, _off(out[0, head, row], exact))
        return _verdict(worst, 2 * HEADS)

    return attention, check


def _linear(length: int, generator: torch.Generator) -> tuple[Attention, Check]:
    def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str:
        worst = 0.0
        for head in range(HEADS):
            state = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
            total = torch.zeros(HEAD_DIM, dtype=torch.float64)
            for keys, values in zip(k[0, head].split(2**16), v[0, head].split(2**16), strict=True):
                features = _elu_features(keys)
                state += features.T @ values.double()
                total += features.sum(0)
            rows = torch.randint(length, (CHECKED_ROWS,), generator=generator)
            features = _elu_features(q[0, head, rows])
            worst = max(worst, _off(out[0, head, rows], features @ state / (features @ total + 1e-6)[:, None]))
        return _verdict(worst, HEADS * CHECKED_ROWS)

    return lambda q, k, v: fastattn.linear_attention(q, k, v), check


def _elu_features(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x.double()) + 1


def _off(got: Tensor, exact: Tensor) -> float:
    """Largest error in units of the largest value."""
    return float((got - exact).abs().max() / exact.abs().max())


def _verdict(worst: float, rows: int) -> str:
    if not worst <= TOLERANCE:
        raise RuntimeError(f"the result is wrong, by {worst:.1e} of the largest value")
    return f"{rows}, off by {worst:.1e} of the largest value at most"


METHODS: dict[str, Callable[[int, torch.Generator], tuple[Attention, Check]]] = {
    "smyrf": _smyrf,
    "lsh": _lsh,
    "clustered": _clustered,
    "linear": _linear,
}


if __name__ == "__main__":
    main()
