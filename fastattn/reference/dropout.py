"""Which attention probabilities dropout keeps: drawn anew from their place wherever they are needed, and never stored.

The draw of a pair is the first word of Philox with (key row, query row, round, batch * heads + head) as counter, so
that kernels, whatever their tiles are, their backward and the definition have the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import philox_of_words

DRAW_BITS = 24  # the highest of each word: a probability is met to 2^-24


def kept(p: float, seed: int | Tensor, head: Tensor, round_id: int, q_rows: Tensor, k_rows: Tensor) -> Tensor:
    """Which pairs stay, bool, in the shape that head, q_rows and k_rows (int64, not negative) broadcast to.

    p: the probability to be dropped. head: batch index * number of heads + head.
    """
    word, *_ = philox_of_words(seed, k_rows, q_rows, torch.full_like(head, round_id), head)
    return word >> (32 - DRAW_BITS) >= round(p * 2**DRAW_BITS)
