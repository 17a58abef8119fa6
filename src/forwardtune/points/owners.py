"""L1: which example every row and token of a model's input belongs to.

By default the first dimension of the input counts the examples. Where examples take several rows (answer options), or share one
(packing), whoever builds the input says so::

    with examples_at(numbers):  # (rows, length), -1 for padding
        model(input_ids)

and where only some of the positions go on, as into a vocabulary head, :func:`positions_of` says which.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..devices import sent
from ..method.estimators import groups_of

_declared: ContextVar[Owners | None] = ContextVar("examples", default=None)
_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)
_copies: ContextVar[tuple[int, set[int]]] = ContextVar("copies", default=(1, set()))


@dataclass(frozen=True, eq=False)
class Owners:
    """The owners of the positions of one input.

    Attributes:
        tokens: number of the example of every position, shape (rows, length), -1 for padding; on the CPU, whatever the model's device.
        count: number of examples.
        copies: 2 if the second half of the input is the first one again, with directions turned round.
    """

    tokens: Tensor
    count: int
    copies: int = 1

    @cached_property
    def rows(self) -> Tensor | None:
        """The example of every row, shape (rows,); None if a row holds several."""
        first = self.tokens.max(dim=1).values
        alone = (self.tokens == first[:, None]) | (self.tokens < 0)
        return first.clamp(min=0) if bool(alone.all()) else None

    @cached_property
    def in_order(self) -> bool:
        """Whether there is a row for every example, in their order."""
        return self.rows is not None and torch.equal(self.rows, torch.arange(self.count))

    @cached_property
    def flat(self) -> Tensor:
        return self.tokens.reshape(-1).clamp(min=0)

    def of(self, lead: Sequence[int], device: torch.device) -> Tensor | None:
        """The example of every place of an activation with these leading dimensions, in a shape that broadcasts against them.

        None if that cannot be told.
        """
        key = (tuple(lead), device)
        if key not in self._of:
            owner = self._found(key[0])
            self._of[key] = None if owner is None else sent(owner, device)
        return self._of[key]

    def spread(self, vectors: Tensor, lead: Sequence[int]) -> Tensor | None:
        """For every place of such an activation the vector of its example, of those in vectors, shape (examples, n), likewise."""
        if self.in_order and len(lead) > 0 and lead[0] == self.count:
            return vectors.reshape(self.count, *(1,) * (len(lead) - 1), -1)
        owner = self.of(lead, vectors.device)
        return None if owner is None else vectors[owner]

    def _found(self, lead: tuple[int, ...]) -> Tensor | None:
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
        return owners_of(self.tokens.reshape(-1)[on_host(positions)][None], self.count, self.copies)

    def grouped(self, size: int) -> Owners:
        """Those of the groups of about that size, into which the examples fall one after the other."""
        if size == 1:
            return self
        if size not in self._grouped:
            groups = groups_of(self.count, size)
            tokens = torch.where(self.tokens < 0, -1, self.tokens * groups // self.count)
            self._grouped[size] = owners_of(tokens, groups, self.copies)
        return self._grouped[size]

    def stacked(self, probes: int) -> Owners:
        """Those of the input so many times, and again for the other sides, one below the other."""
        if probes not in self._stacked:
            all_of = [torch.where(self.tokens < 0, -1, self.tokens + k * self.count) for k in range(2 * probes)]
            self._stacked[probes] = Owners(torch.cat(all_of), 2 * probes * self.count, 2)
        return self._stacked[probes]

    @cached_property
    def _stacked(self) -> dict[int, Owners]:
        return {}

    @cached_property
    def _grouped(self) -> dict[int, Owners]:
        return {}

    @cached_property
    def _of(self) -> dict[tuple[tuple[int, ...], torch.device], Tensor | None]:
        return {}

    @cached_property
    def _groups(self) -> dict[tuple[tuple[int, ...], torch.device], Groups | None]:
        return {}

    def groups(self, lead: Sequence[int], device: torch.device) -> Groups | None:
        """The places of an activation with these leading dimensions, example by example; None if that cannot be told."""
        key = (tuple(lead), device)
        if key not in self._groups:
            owner = self._found(key[0])
            self._groups[key] = (
                None if owner is None else Groups(self.count, owner.expand(lead).reshape(-1), device, self.copies)
            )
        return self._groups[key]


@dataclass(frozen=True, eq=False)
class Groups:
    """The places of every example among the rows of a matrix.

    Attributes:
        count: number of examples.
        owner: the example of every row, shape (rows,), on the CPU; None: there is one.
        device: of the matrix.
        copies: as of :class:`Owners`; those of a second copy have the directions of the first, turned round.
    """

    count: int
    owner: Tensor | None = None
    device: torch.device | str = "cpu"
    copies: int = 1

    @property
    def directions(self) -> int:
        """Number of different ones."""
        return self.count // self.copies

    def one_hot(self, dtype: torch.dtype, repeat: int, beside: int = 0) -> Tensor | None:
        """1, or -1 in a second copy, where a row has a direction, each so many times, and columns of 1 beside them, shape (rows, directions *
        repeat + beside)."""
        if self.owner is None:
            return None
        key = (dtype, repeat, beside)
        if key not in self._one_hot:
            sign = 1 - 2 * (self.owner // self.directions)
            hot = F.one_hot(self.owner % self.directions, self.directions) * sign[:, None]
            hot = F.pad(hot.repeat_interleave(repeat, dim=1), (0, beside), value=1)
            self._one_hot[key] = sent(hot, self.device, dtype)
        return self._one_hot[key]

    @cached_property
    def _one_hot(self) -> dict[tuple[torch.dtype, int, int], Tensor]:
        return {}

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """By example the numbers of its rows, and of some row where it has fewer than others, shape (examples, most rows); which of them,
        flattened, are its own; and their numbers. None: rows follow each other, as many for each example."""
        if self.owner is None:
            return None
        sizes = torch.bincount(self.owner, minlength=self.count)
        most = int(sizes.max())
        if int(sizes.min()) == most and bool((self.owner[1:] >= self.owner[:-1]).all()):
            return None
        inside = torch.arange(most)
        order = self.owner.argsort(stable=True)
        places = order[((sizes.cumsum(0) - sizes)[:, None] + inside).clamp(max=len(order) - 1)]
        own = (inside < sizes[:, None]).reshape(-1).nonzero()[:, 0]
        there = [sent(x, self.device) for x in (places, own, places.reshape(-1)[own])]
        return there[0], there[1], there[2]

    def blocks(self, x: Tensor) -> Tensor | None:
        """The rows of a matrix (rows, n) by example, (examples, rows, n), if they follow each other."""
        return x.view(self.count, -1, x.shape[-1]) if self._places is None else None

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of a matrix (rows, n) by example: (examples, most rows, n); filled up with some row."""
        return x.view(self.count, -1, x.shape[-1]) if self._places is None else x[self._places[0]]

    def add_vectors(self, y: Tensor, vectors: Tensor, scale: float) -> None:
        """Add scale times the vector of its example, shape (examples, m), to every row of the matrix y, in place."""
        own = None if self._places is None else self.one_hot(y.dtype, 1)
        if own is None:
            y.view(self.count, -1, y.shape[-1]).add_(vectors[:, None], alpha=scale)
        else:
            y.addmm_(own, vectors[: self.directions], alpha=scale)

    def add_to(self, y: Tensor, parts: Tensor) -> None:
        """Add rows by example, shape (examples, most rows, m), to the matrix y (rows, m), in place."""
        if self._places is None:
            y.view(self.count, -1, y.shape[-1]).add_(parts)
        else:
            _, own, rows = self._places
            y.index_add_(0, rows, parts.flatten(0, 1)[own].to(y.dtype))


# Copies on the host, and how often the tensor had been written to.
_there: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def on_host(numbers: Tensor) -> Tensor:
    """A tensor of a device on the host. Only the first time that it is asked for is there something to wait for."""
    if numbers.device.type == "cpu":
        return numbers
    version = -1 if numbers.is_inference() else numbers._version
    known, copy = _there.get(numbers, (None, numbers))
    if known != version or version < 0:
        copy = numbers.cpu()
        _there[numbers] = version, copy
    return copy


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, of which :func:`on_host` knows."""
    there = sent(numbers, device)
    if there is not numbers and not there.is_inference():
        _there[there] = there._version, numbers.clone()
    return there


# Those of inputs seen lately: what is made of them, and copied to the device, is the same for the same owners.
_kept: OrderedDict[tuple[Any, ...], Owners] = OrderedDict()
_MOST = 16


def owners_of(tokens: Tensor, count: int, copies: int = 1) -> Owners:
    """:class:`Owners`: the same object for the same numbers, if they were seen lately."""
    key = (tokens.shape, tokens.contiguous().numpy().tobytes(), count, copies)
    owners = _kept.pop(key, None) or Owners(tokens.clone(), count, copies)
    _kept[key] = owners
    if len(_kept) > _MOST:
        _kept.popitem(last=False)
    return owners


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
    tokens = on_host(numbers)
    tokens = tokens[:, None] if tokens.ndim == 1 else tokens
    token = _declared.set(owners_of(tokens.long(), int(tokens.max()) + 1 if count is None else count))
    try:
        yield
    finally:
        _declared.reset(token)


@contextmanager
def copies_of(count: int) -> Iterator[set[int]]:
    """Inside, the model works on so many copies of its input at once. Yields how many places it was made to go on with."""
    token = _copies.set((count, set()))
    try:
        yield _copies.get()[1]
    finally:
        _copies.reset(token)


def in_all_copies(positions: Tensor, places: int, device: torch.device) -> Tensor:
    """Positions of the flattened input, in each of the copies that the model works on now, on a device; ``places``: of all copies."""
    count, widths = _copies.get()
    if count > 1:
        there = on_host(positions)
        positions = torch.cat([there + places // count * k for k in range(count)])
        widths.add(len(positions))
    return positions if positions.device == device else to_device(on_host(positions), device)


@contextmanager
def positions_of(positions: Tensor) -> Iterator[None]:
    """Inside, the model works on these positions of the flattened input alone, in one row."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)
