"""L1: which example every row and token of a model's input belongs to.

By default the first dimension of the input counts the examples. Where examples take several rows (answer options), or share one
(packing), whoever builds the input says so::

    with examples_at(numbers):  # (rows, length), -1 for padding
        model(input_ids)

and where only some of the positions go on, as into a vocabulary head, :func:`positions_of` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_declared: ContextVar[Owners | None] = ContextVar("examples", default=None)
_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)


@dataclass(frozen=True, eq=False)
class Owners:
    """The owners of the positions of one input.

    Attributes:
        tokens: number of the example of every position, shape (rows, length), -1 for padding.
        count: number of examples.
    """

    tokens: Tensor
    count: int
    _selection: tuple[Tensor, Owners] | None = field(default=None, init=False, repr=False)

    @cached_property
    def rows(self) -> Tensor | None:
        """The example of every row, shape (rows,); None if a row holds several."""
        first = self.tokens.max(dim=1).values
        alone = (self.tokens == first[:, None]) | (self.tokens < 0)
        return first.clamp(min=0) if bool(alone.all()) else None

    @cached_property
    def flat(self) -> Tensor:
        return self.tokens.reshape(-1).clamp(min=0)

    def of(self, lead: Sequence[int]) -> Tensor | None:
        """The example of every place of an activation with these leading dimensions, in a shape that broadcasts against them.

        None if that cannot be told.
        """
        lead = tuple(lead)
        height, length = self.tokens.shape
        ones = (1,) * (len(lead) - 1)
        if not lead:
            return None
        if lead[0] == height and self.rows is not None:
            return self.rows.view(-1, *ones)
        if lead[:2] == (height, length):
            return self.flat.view(height, length, *(1,) * (len(lead) - 2))
        if len(lead) == 3 and (lead[0], lead[2]) == (height, length):  # (rows, heads, length)
            return self.flat.view(height, 1, length)
        if lead[0] == height * length:
            return self.flat.view(-1, *ones)
        return None

    def at(self, positions: Tensor) -> Owners:
        """The owners of some positions of the flattened input, which stand in one row."""
        if self._selection is None or self._selection[0] is not positions:
            tokens = self.tokens.reshape(-1)[positions.to(self.tokens.device)][None]
            object.__setattr__(self, "_selection", (positions, Owners(tokens, self.count)))
        assert self._selection is not None
        return self._selection[1]

    @cached_property
    def _groups(self) -> dict[tuple[int, ...], Groups | None]:
        return {}

    def groups(self, lead: Sequence[int]) -> Groups | None:
        """The places of an activation with these leading dimensions, example by example; None if that cannot be told."""
        key = tuple(lead)
        if key not in self._groups:
            owner = self.of(key)
            self._groups[key] = None if owner is None else Groups(self.count, owner.expand(key).reshape(-1))
        return self._groups[key]


@dataclass(frozen=True, eq=False)
class Groups:
    """The places of every example among the rows of a matrix.

    Attributes:
        count: number of examples.
        owner: the example of every row, shape (rows,); None: there is one.
    """

    count: int
    owner: Tensor | None = None

    def one_hot(self, like: Tensor, repeat: int) -> Tensor | None:
        """1 where an example owns a row, each so many times, shape (rows, examples * repeat), in the dtype and on the device of ``like``."""
        if self.owner is None:
            return None
        key = (like.dtype, like.device, repeat)
        if key not in self._one_hot:
            hot = F.one_hot(self.owner, self.count).to(like.device, like.dtype)
            self._one_hot[key] = hot.repeat_interleave(repeat, dim=1)
        return self._one_hot[key]

    @cached_property
    def _one_hot(self) -> dict[tuple[torch.dtype, torch.device, int], Tensor]:
        return {}

    @cached_property
    def _places(self) -> Tensor | None:
        """Shape (examples, most rows), -1 where an example has fewer; None: they follow each other, as many for each."""
        if self.owner is None:
            return None
        sizes = torch.bincount(self.owner, minlength=self.count)
        most = int(sizes.max())
        if int(sizes.min()) == most and bool((self.owner[1:] >= self.owner[:-1]).all()):
            return None
        inside = torch.arange(most, device=self.owner.device)
        places = (sizes.cumsum(0) - sizes)[:, None] + inside
        order = self.owner.argsort(stable=True)
        return order[places.clamp(max=len(order) - 1)].masked_fill(inside >= sizes[:, None], -1)

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of a matrix (rows, n) by example: (examples, most rows, n); filled up with some row."""
        if self._places is None:
            return x.view(self.count, -1, x.shape[-1])
        return x[self._places.clamp(min=0).to(x.device)]

    def add_to(self, y: Tensor, parts: Tensor) -> None:
        """Add rows by example, shape (examples, most rows, m), to the matrix y (rows, m), in place."""
        if self._places is None:
            y.view(self.count, -1, y.shape[-1]).add_(parts)
        else:
            places = self._places.to(y.device)  # whoever says whose they are may do so on another
            present = places >= 0
            y.index_add_(0, places[present], parts[present].to(y.dtype))


def declared() -> Owners | None:
    """What was said of the model's input."""
    return _declared.get()


def selected() -> Tensor | None:
    """The positions of the flattened input that the model works on now; None: all."""
    return _positions.get()


@contextmanager
def examples_at(numbers: Tensor, count: int | None = None) -> Iterator[None]:
    """Inside, the positions of the model's input belong to the examples of these numbers.

    Args:
        numbers: int64, shape (rows, length), or (rows,) where a row belongs to one example; -1 for padding.
        count: number of examples; by default one more than the largest number.
    """
    tokens = numbers[:, None] if numbers.ndim == 1 else numbers
    token = _declared.set(Owners(tokens, int(numbers.max()) + 1 if count is None else count))
    try:
        yield
    finally:
        _declared.reset(token)


@contextmanager
def positions_of(positions: Tensor) -> Iterator[None]:
    """Inside, the model works on these positions of the flattened input alone, in one row."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)
