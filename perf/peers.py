"""Other libraries' attention on (B, H, N, D) tensors, for timing beside ours: ``make bench-peers`` installs them.

``peer(name)`` loads one of :data:`PEERS` and ``.calls(q, k, v, dout)`` prepares it on given inputs: whatever layout it
likes best is made beforehand, outside of what is timed, and no dropout is on. Where it can't be loaded, ``peer`` raises
:class:`Missing`, which says why.

    calls = peer("reformer-pytorch", 1024, 8, 64, q.device).calls(q, k, v, dout)
    calls.forward()  # out, in inference mode
    calls.both()  # forward and backward: gradients

:mod:`perf.versus` makes rows of them; a bench names its peers there and need not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# the settings that the goals are for
ROUNDS, BUCKET = 4, 64
CLUSTERS, BITS, TOPK = 100, 63, 32


class Missing(RuntimeError):
    """A peer that can't be measured here, and why."""


@dataclass(frozen=True)
class Calls:
    """One attention on given inputs. forward: in inference mode, returns out. both: forward and backward, gradients."""

    forward: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Peer:
    """attention: of (q, k, v) in its own layout. own: (B, H, N, D) in that layout. back: the other way."""

    attention: Attention
    own: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    def calls(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Calls:
        """On q, k, v and dout, the gradient of the output: all (B, H, N, D)."""
        return attention_calls(self.attention, *(self.own(x) for x in (q, k, v, dout)))


def attention_calls(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Calls:
    """Both passes of any function of q, k and v; one that leaves an input out gives it no gradient.

    They return when the device is done.
    """

    def forward() -> Tensor:
        out = attention(q, k, v)
        synchronize(q.device)
        return out

    def both() -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        gradients = torch.autograd.grad(attention(*leaves), leaves, dout, allow_unused=True)
        synchronize(q.device)
        return gradients

    return Calls(torch.inference_mode()(forward), both)


def synchronize(device: torch.device) -> None:
    """Waits for what was launched; a CPU is done when a call returns."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def peer(name: str, length: int, heads: int, head_dim: int, device: torch.device) -> Peer:
    """The peer of that name, for inputs of (B, heads, length, head_dim) on a device.

    Raises:
        Missing: it is not installed, or does not load.
    """
    try:
        with device:  # modules and masks are made there
            return PEERS[name](length, heads, head_dim)
    except (ImportError, OSError, AttributeError) as problem:
        raise Missing(f"not installed, or does not load: {problem}".splitlines()[0]) from problem


def _reformer_pytorch(length: int, heads: int, head_dim: int) -> Peer:
    from reformer_pytorch import LSHAttention  # pyright: ignore[reportMissingImports]

    module = LSHAttention(bucket_size=BUCKET, n_hashes=ROUNDS, causal=True).eval()  # eval: no cache of buckets
    return Peer(lambda q, k, v: module(q, v)[0], lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (-1, heads)))


def _transformers_lsh(length: int, heads: int, head_dim: int) -> Peer:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        attention_head_size=head_dim, num_attention_heads=heads, hidden_size=heads * head_dim, is_decoder=True,
        lsh_attn_chunk_length=BUCKET, num_hashes=ROUNDS, num_buckets=length // BUCKET, attn_layers=["lsh"],
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = LSHSelfAttention(config, layer_idx=0).eval()
    # its projections are no part of the attention: queries (its keys as well) and values are handed through
    values = _Given()
    module.add_module("query_key", nn.Identity())
    module.add_module("value", values)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values.given = v
        return module(q).hidden_states

    return Peer(
        attention, lambda x: x.transpose(1, 2).flatten(2), lambda x: x.unflatten(2, (heads, -1)).transpose(1, 2)
    )


class _Given(nn.Module):
    given: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.given


def _clustered(length: int, heads: int, head_dim: int) -> Peer:
    from fast_transformers.attention import ClusteredAttention  # pyright: ignore[reportMissingImports]

    return _fast_transformers(ClusteredAttention(CLUSTERS, bits=BITS, attention_dropout=0.0), length)


def _improved_clustered(length: int, heads: int, head_dim: int) -> Peer:
    from fast_transformers.attention import ImprovedClusteredAttention  # pyright: ignore[reportMissingImports]

    return _fast_transformers(ImprovedClusteredAttention(CLUSTERS, bits=BITS, topk=TOPK, attention_dropout=0.0), length)


def _linear(length: int, heads: int, head_dim: int) -> Peer:
    from fast_transformers.attention import LinearAttention  # pyright: ignore[reportMissingImports]

    return _fast_transformers(LinearAttention(head_dim), length)


def _causal_linear(length: int, heads: int, head_dim: int) -> Peer:
    from fast_transformers.attention import CausalLinearAttention  # pyright: ignore[reportMissingImports]

    return _fast_transformers(CausalLinearAttention(head_dim), length, is_causal=True)


def _flash_linear(length: int, heads: int, head_dim: int) -> Peer:
    from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (nn.functional.elu(x) + 1 for x in (q, k))  # it takes features
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]

    return Peer(attention, _rows_first, lambda x: x.transpose(1, 2))


def _rows_first(x: Tensor) -> Tensor:
    """(B, H, N, D) as a contiguous (B, N, H, D)."""
    return x.transpose(1, 2).contiguous()


def _fast_transformers(module: Any, length: int, is_causal: bool = False) -> Peer:
    from fast_transformers.masking import (  # pyright: ignore[reportMissingImports]
        FullMask,
        LengthMask,
        TriangularCausalMask,
    )

    # a mask of one row says of its kind all that these methods ask; one of every row would be (N, N)
    mask = TriangularCausalMask(1) if is_causal else FullMask(1)
    lengths = LengthMask(torch.tensor([length]))
    _ = lengths.float_matrix, lengths.additive_matrix  # made when first asked for, which is not to be in inference mode

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, mask, lengths, lengths)

    # it takes (B, N, H, D) and copies to (B, H, N, D) inside, which costs nothing where memory is in that order already
    return Peer(attention, lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2))


PEERS: dict[str, Callable[[int, int, int], Peer]] = {
    "reformer-pytorch": _reformer_pytorch,
    "transformers' LSH attention": _transformers_lsh,
    "fast-transformers' clustered": _clustered,
    "fast-transformers' improved clustered": _improved_clustered,
    "fast-transformers' linear": _linear,
    "fast-transformers' causal linear": _causal_linear,
    "flash-linear-attention's causal linear": _flash_linear,
}
