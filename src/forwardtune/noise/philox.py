"""Philox-4x32-10, the counter-based generator under every direction, in plain torch.

A counter-based generator has no state: it maps (key, counter) to four random words, so any element of any direction can
be computed alone, in any order and on any device.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def split_seed(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a 64-bit seed, low word first."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be an integer from 0 to 2**64 - 1, got {seed}")
    return seed & WORD, seed >> 32


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor | int, ...]:
    """Four 32-bit output words for a counter of four 32-bit words.

    Args:
        counter: four words, each an int or an int64 tensor; tensors broadcast against each other.
        key: two words.

    Returns:
        Four words in the type of the inputs (int64 tensors hold values from 0 to 2**32 - 1).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64; the mask after the arithmetic shift leaves the true high word.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def half_words(
    seed: int, tensor: int, step: int, probe: int, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The 16-bit half-words of elements ``start .. start + count - 1`` of one tensor.

    Element i takes half-word ``i mod 8`` of block ``i div 8``, low half first; a block is the output for the counter
    (block, tensor, step, probe).

    Returns:
        int64 tensor of shape ``(count,)`` with values from 0 to 65,535.
    """
    first, last = start // 8, (start + count + 7) // 8
    blocks = torch.arange(first, last, dtype=torch.int64, device=device)
    words = torch.stack(
        [torch.as_tensor(w, device=device) for w in philox((blocks, tensor, step, probe), split_seed(seed))], dim=1
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)
    offset = start - 8 * first
    return halves[offset : offset + count]
