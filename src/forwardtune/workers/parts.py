"""A minibatch in parts, and which rank evaluates which query on which part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import InputError
from ..method.estimators import Query, groups_of

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Parts:
    """A minibatch in parts. Their losses add up to the loss of the minibatch; with ``assignment="example"`` they stand one after another.

    Passed to ``MeZO.step`` in the place of a closure. It is what several workers may share beside the queries, and one
    process evaluates the parts in order, with the same bits.

    Args:
        closures: give the loss of each part, a share of that of the minibatch, such as ``sum over the part / examples of the minibatch``.
        examples: the number of examples in each part; needed with ``assignment="example"``.
        digest: of the data. Workers with another one are refused.
    """

    closures: Sequence[Closure]
    examples: Sequence[int] | None = None
    digest: bytes = b""

    @classmethod
    def of(cls, closure: Closure | Parts) -> Parts:
        """A closure is a minibatch in one part."""
        return closure if isinstance(closure, Parts) else cls((closure,))

    def require(self, most: int, per_example: bool) -> None:
        """Raise InputError unless there are from 1 to ``most`` parts, of known sizes where directions depend on that."""
        if not 1 <= len(self.closures) <= most:
            raise InputError(
                f"the minibatch came in {len(self.closures)} parts, and the optimizer was made for {most}: pass MeZO(parts=...) the "
                "largest number, and step() a forwardtune.Parts of at most so many closures"
            )
        if per_example and len(self.closures) > 1 and (self.examples is None or len(self.examples) != len(self)):
            raise InputError(
                "assignment='example' gives every example of the minibatch a direction of its own: say how many examples each "
                "part has, Parts(closures, examples=[...])"
            )

    def __len__(self) -> int:
        return len(self.closures)

    def queries(self, queries: Sequence[Query], part: int) -> list[Query]:
        """The queries as a part sees them, whose examples come after those of the parts before it."""
        before = self.examples[:part] if self.examples is not None and part else ()
        return [query.after(sum(groups_of(count, query.group) for count in before)) for query in queries]


class Unit(NamedTuple):
    """One evaluation of a step: a query on a part."""

    query: int
    part: int


def deal(queries: int, parts: int, ranks: int) -> list[list[Unit]]:
    """The units of a step by rank: query after query, whole runs of them, and as many for each rank as can be."""
    units = [Unit(query, part) for query in range(queries) for part in range(parts)]
    bounds = [rank * len(units) // ranks for rank in range(ranks + 1)]
    return [units[lo:hi] for lo, hi in pairwise(bounds)]


def cut(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Items in so many runs whose lengths differ by one at most; fewer runs where there are fewer items."""
    parts = min(parts, len(items))
    bounds = [part * len(items) // parts for part in range(parts + 1)]
    return [items[lo:hi] for lo, hi in pairwise(bounds)]
