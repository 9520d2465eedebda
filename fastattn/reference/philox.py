"""Philox 4x32-10 by definition (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4): the
numbers that ``tl.randint4x`` gives in kernels, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)  # of the key from round to round


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64, for each value of ``counter`` (int64, not negative).

    seed: int64, broadcasts against ``counter``.
    """
    zero = torch.zeros_like(counter)
    return philox_of_words(seed, counter & _WORD, counter >> 32, zero, zero)


def philox_of_words(
    seed: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a counter of four words (int64, below 2^32) that broadcast against one another: ``tl.philox``."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # products wrap at 64 bits, and all of these are wanted
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _STEPS[0]) & _WORD, (k1 + _STEPS[1]) & _WORD
    return c0, c1, c2, c3
