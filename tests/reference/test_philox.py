"""Philox against the known answers that its authors publish (Random123, kat_vectors)."""

from __future__ import annotations

import pytest
import torch

from fastattn.reference.philox import philox, philox_of_words

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# (counter, key, words)
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_gives_the_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    drawn = philox_of_words(torch.tensor(key), *map(torch.tensor, counter))
    assert tuple(int(word) for word in drawn) == words


def test_a_counter_of_64_bits_is_two_words() -> None:
    counter = torch.tensor([7, 2**32 + 7, 5 * 2**40])
    words = philox_of_words(torch.tensor(3), counter % 2**32, counter // 2**32, torch.tensor(0), torch.tensor(0))
    assert torch.equal(torch.stack(philox(torch.tensor(3), counter)), torch.stack(words))
