"""Updates that leave rows alone: those of a tensor that no evaluation has read yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..devices import sent
from ..noise import Count, Noise, Update, flattened

# Elements handled at once: a copy of so many is kept while they are updated. A row is not cut. A GPU wants large pieces, of which each takes
# some launches.
_PIECE, _PIECE_ON_GPU = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Masked(Noise):
    """The noise of a run for one tensor: what it writes at a step leaves the rows alone that were not read up to that step.

    Rows are those of the tensor's first dimension: experts, or entries of a table. A row that was not read yet has no history either: what
    rules remember of it is 0, as it was in the beginning.

    Attributes:
        full: shape of the whole tensor.
        unread: step -> which rows were not read yet, bool, shape (rows,), on the CPU; steps that are missing leave nothing alone.
    """

    full: tuple[int, ...] = ()
    unread: Mapping[int, Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, noise: Noise, shape: Sequence[int], unread: Mapping[int, Tensor]) -> Masked:
        """The noise of a run, for a tensor of this shape."""
        return cls(noise.seed, noise.direction, noise.structure, noise.emphasis, tuple(shape), unread)

    def update(
        self, weight: Tensor, updates: Sequence[Update], *, tensor: int, start: int = 0,
        shape: Sequence[int] | None = None,
    ) -> Count:  # fmt: skip
        unchanged: Count = 0
        for mask, some in groupby(updates, lambda update: _Same(self.unread.get(update.step))):
            steps = list(some)
            with flattened(weight) as flat:
                for piece, lo, own in self._pieces(flat, start, mask.value):
                    if own is ALL:
                        unchanged += piece.numel() * len(steps)
                        continue
                    kept = None if own is None else piece.clone()
                    count = super().update(piece, steps, tensor=tensor, start=lo, shape=self.full)
                    unchanged += count if own is None or kept is None else _leave(piece, kept, own, len(steps), count)
        return unchanged

    def store(self, weight: Tensor, x: Tensor, *, tensor: int, step: int, start: int = 0) -> Count:
        unchanged: Count = 0
        for piece, lo, own in self._pieces(weight, start, self.unread.get(step)):
            if own is ALL:
                unchanged += piece.numel()
                continue
            kept = None if own is None else piece.clone()
            values = x[lo - start : lo - start + piece.numel()]
            count = super().store(piece, values, tensor=tensor, step=step, start=lo)
            unchanged += count if own is None or kept is None else _leave(piece, kept, own, 1, count)
        return unchanged

    def _pieces(self, flat: Tensor, start: int, unread: Tensor | None) -> Iterable[tuple[Tensor, int, Tensor | None]]:
        """Pieces of flat storage that begins at an element of the tensor: each with its first element, and which elements to leave
        alone; None: none; ALL."""
        if unread is None:
            yield flat, start, None
            return
        width, end = math.prod(self.full[1:]), start + flat.numel()
        most = max(1, (_PIECE_ON_GPU if flat.device.type == "cuda" else _PIECE) // width)
        for first, last, alone in _runs(unread, start // width, -(-end // width), most):
            lo, hi = max(start, first * width), min(end, last * width)
            elements = None
            if alone is None:
                rows = sent(unread[first:last], flat.device)
                elements = rows[:, None].expand(-1, width).reshape(-1)[lo - first * width : hi - first * width]
            yield flat[lo - start : hi - start], lo, ALL if alone else elements


def _runs(unread: Tensor, first: int, end: int, most: int) -> Iterator[tuple[int, int, bool | None]]:
    """Rows that follow each other: where they begin and end, and whether none of them was read, or all; None, of at most so many rows:
    some."""
    run: tuple[int, int, bool | None] | None = None
    for lo in range(first, end, most):
        own = unread[lo : min(lo + most, end)]
        alone = bool(own[0]) if bool((own == own[0]).all()) else None
        if run is not None and alone is not None and run[2] is alone:
            run = run[0], lo + len(own), alone
            continue
        if run is not None:
            yield run
        run = lo, lo + len(own), alone
    if run is not None:
        yield run


#: Every element of a piece.
ALL = torch.ones((), dtype=torch.bool, device="cpu")


class _Same:
    """A mask, compared by identity: steps in which nothing was read for the first time have one mask."""

    def __init__(self, value: Tensor | None) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _leave(piece: Tensor, kept: Tensor, alone: Tensor, steps: int, unchanged: Count) -> Count:
    """Give elements their values back. Returns how many stored values did not change, all of them taken together where there are several
    steps, given how many did not before."""
    piece.copy_(torch.where(alone, kept, piece))
    return (piece == kept).sum() if steps == 1 else unchanged
