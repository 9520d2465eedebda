"""Attention on packed sequences of different lengths, in the layout of flash-attention's ``varlen`` interface.

Sequences whose lengths lie within a quarter of one another make one padded batch, with masks that the methods keep
exactly. So a call runs the method once for each of these groups, not for each sequence: lengths from m to n make at
most log(n / m) / log(4 / 3) + 2 of them (cross-attention: that for queries times that for keys; SMYRF in
cross-attention: one for each number of clusters; LSH: one more, for what is short enough to be dense). At most a
quarter of a group is padding, so time is at most 4/3 of what the rows themselves take (dense: 16/9), and gathering rows
and putting them back moves q, k, v and out once more. The lengths decide shapes: on a GPU the host waits for them, and
under ``torch.compile`` they break the graph.

All sequences have the same draws, such as SMYRF's projections; dropout differs from sequence to sequence, but with LSH
and the clustered methods repeats from group to group. Where LSH's number of buckets is not given, it is that of the
longest sequence that a group may have, and sequences with another number have other directions. Arguments that speak
of rows (masks, given clusters or buckets, states, a returned lse) have no packed form.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.methods import common, reformer, smyrf_routing
from fastattn.ops import checks

_OF_ROWS = (
    "key_mask", "query_mask", "clusters", "buckets", "initial_centroids", "initial_state", "return_state", "return_lse",
)  # fmt: skip


def attend_packed(
    q: Any,
    k: Any,
    v: Any,
    method: str,
    function: Callable[..., Tensor],
    cu_seqlens: Any,
    cu_seqlens_k: Any,
    knobs: dict[str, Any],
) -> Tensor:
    """q (total, H, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv) -> (total, H, Dv); see :func:`fastattn.attend`."""
    _check(q, k, v, method, knobs)
    if method == "lsh":
        _check_lsh(cu_seqlens_k, knobs)
    of_q = _Sequences.of("cu_seqlens", cu_seqlens, q, "q")
    if cu_seqlens_k is None:
        of_k = _Sequences.of("cu_seqlens", cu_seqlens, k, "k")
    else:
        of_k = _Sequences.of("cu_seqlens_k", cu_seqlens_k, k, "k")
    if len(of_k.lengths) != len(of_q.lengths):
        raise ValueError(
            f"cu_seqlens_k must have as many sequences as cu_seqlens, {len(of_q.lengths)}, got {len(of_k.lengths)}"
        )
    for name in ("is_causal", "local_window"):
        if knobs.get(name) and of_q.lengths != of_k.lengths:
            raise ValueError(f"{name} needs as many keys as queries in each sequence")

    # the first row is for queries without keys; made of the inputs, so that a backward passes where no other is
    nothing = q[:0].sum() + k[:0].sum() + v[:0].sum()
    outs = [nothing.expand(1, q.shape[1], v.shape[2])]
    place = torch.zeros(len(q), dtype=torch.long)  # of each row of q, in outs
    size = 1
    groups = _groups(of_q.lengths, of_k.lengths, method, knobs)
    for group, draws in zip(groups, _draws(function, knobs, q.device), strict=False):
        rows, query_mask = of_q.padded(group)
        key_rows, key_mask = of_k.padded(group)
        place[rows[query_mask]] = size + query_mask.flatten().nonzero().squeeze(-1)
        masks = _masks(function, of_q.lengths[group[0]] == of_k.lengths[group[0]], query_mask, key_mask, q.device)
        if method == "lsh":  # its queries are its keys
            keys, chosen = [], _buckets(of_q.lengths[group[0]], knobs)
        else:
            keys, chosen = [_gather(k, key_rows)], {}
        out = function(_gather(q, rows), *keys, _gather(v, key_rows), **{**knobs, **draws, **masks, **chosen})
        outs.append(out.transpose(1, 2).flatten(0, 1))
        size += rows.numel()
    return torch.cat(outs).index_select(0, place.to(q.device))


def _check(q: Any, k: Any, v: Any, method: str, knobs: dict[str, Any]) -> None:
    for name in _OF_ROWS:
        if knobs.get(name) is not None and knobs[name] is not False:
            raise ValueError(f"{name} can't be given together with cu_seqlens")
    checks.check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (total length, heads, head_dim) with cu_seqlens, "
                f"got shape {tuple(x.shape)}"
            )
    if len(v) != len(k):
        raise ValueError(f"v must have k's length {len(k)}, got shape {tuple(v.shape)}")


def _check_lsh(cu_seqlens_k: Any, knobs: dict[str, Any]) -> None:
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k must be None with method='lsh', whose queries are its keys")
    if knobs.get("padding", "last") != "last":
        raise ValueError(f"padding must be 'last' together with cu_seqlens, got {knobs['padding']!r}")
    checks.check_int("bucket_size", knobs.get("bucket_size", 64), 1)
    if knobs.get("dense_threshold") is not None:
        checks.check_int("dense_threshold", knobs["dense_threshold"], 0)


@dataclass(frozen=True)
class _Sequences:
    """Where each sequence starts among the packed rows, and its length."""

    starts: list[int]
    lengths: list[int]

    @staticmethod
    def of(name: str, cu_seqlens: Any, x: Tensor, what: str) -> _Sequences:
        checks.check_tensors(**{name: cu_seqlens})
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
        edges = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(edges)]
        if edges[0] != 0 or edges[-1] != len(x) or min(lengths, default=0) < 0:
            raise ValueError(
                f"{name} must start with 0, end with the length of {what}, {len(x)}, and never fall; "
                f"got {edges if len(edges) < 10 else [*edges[:4], '...', *edges[-4:]]}"
            )
        return _Sequences(edges[:-1], lengths)

    def padded(self, group: list[int]) -> tuple[Tensor, Tensor]:
        """Which packed rows make the padded batch of these sequences, (G, L), on the CPU, and which of its places are
        real, (G, L) bool. Padding repeats a sequence's last row."""
        starts, lengths = (torch.tensor([x[i] for i in group]).unsqueeze(-1) for x in (self.starts, self.lengths))
        at = torch.arange(int(lengths.max()))
        return starts + torch.minimum(at, lengths - 1), at < lengths


def _groups(q_lengths: list[int], k_lengths: list[int], method: str, knobs: dict[str, Any]) -> list[list[int]]:
    """Sequences that make one padded batch each; those without queries or without keys are in none.

    Those with as many keys as queries stand apart: methods treat them as self-attention."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, (n, s) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        if n > 0 and s > 0:
            own = None
            if method == "smyrf":
                own = _smyrf_clusters(n, s, knobs)
            elif method == "lsh":
                own = n <= _dense_length(knobs)
            groups[_level(n), _level(s), n == s, own].append(i)
    return list(groups.values())


def _level(length: int) -> int:
    return math.floor(math.log(length) / math.log(4 / 3))


def _dense_length(knobs: dict[str, Any]) -> int:
    sizes = knobs.get("dense_threshold"), knobs.get("bucket_size", 64), knobs.get("across_buckets", True)
    return reformer.dense_length(*sizes)


def _buckets(length: int, knobs: dict[str, Any]) -> dict[str, Any]:
    """How many buckets LSH has in the group of a sequence: what else is in the group does not decide it."""
    if knobs.get("n_buckets") is not None or knobs.get("rotations") is not None:
        return {}
    longest = math.floor((4 / 3) ** (_level(length) + 1))
    return {"n_buckets": reformer.default_factors(longest, knobs.get("bucket_size", 64))}


def _smyrf_clusters(n: int, s: int, knobs: dict[str, Any]) -> Hashable:
    """What decides the clusters of SMYRF beside the rows that take part: nothing where they are filled one after the
    other, the numbers of them where they are cut at quantiles."""
    q_size, k_size = knobs.get("q_cluster_size", 64), knobs.get("k_cluster_size")
    checks.check_int("q_cluster_size", q_size, 1)
    if k_size is not None:
        checks.check_int("k_cluster_size", k_size, 1)
    clusters = smyrf_routing.plan(n, s, q_size, k_size, is_self_like=n == s)
    return None if clusters.packed else (clusters.n_blocks, -(-n // q_size))


def _draws(function: Callable[..., Any], knobs: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """For each group what makes its draws the same as those of the others, but for dropout, where they differ."""
    taken = inspect.signature(function).parameters
    if "generator" not in taken:
        while True:
            yield {}
    generator, given = knobs.get("generator"), knobs.get("seed")
    drawn = int(common.draw_seed(generator, torch.device("cpu"))) // 2
    place, number = device if generator is None else generator.device, 0
    while True:
        seed = {"seed": (drawn if given is None else given) + number} if "seed" in taken else {}
        yield {"generator": torch.Generator(place).manual_seed(drawn), **seed}
        number += 1


def _masks(
    function: Callable[..., Any], same: bool, query_mask: Tensor, key_mask: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """The masks that ``function`` takes. same: queries and keys are the same rows, which one mask says."""
    if query_mask.all() and key_mask.all():
        return {}
    masks = {"key_mask": key_mask} if same else {"key_mask": key_mask, "query_mask": query_mask}
    taken = inspect.signature(function).parameters
    return {name: mask.to(device) for name, mask in masks.items() if name in taken}


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """x (total, H, D) at rows (G, L): (G, H, L, D)."""
    return x.index_select(0, rows.flatten().to(x.device)).unflatten(0, rows.shape).transpose(1, 2)
