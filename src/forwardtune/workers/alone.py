"""One process does everything; and what workers are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ..method.estimators import Losses, Query
from ..method.unread import Used
from .parts import Closure, Parts

T = TypeVar("T")


class Seen(NamedTuple):
    """What evaluations showed: the tuned tensors that were read, and the ids of those found to have no side path."""

    used: Used = Used()
    left_out: frozenset[int] = frozenset()

    def __or__(self, other: Seen) -> Seen:
        return Seen(self.used.merged(other.used), self.left_out | other.left_out)


Evaluate: TypeAlias = "Callable[[Sequence[Query], Closure], tuple[list[Losses], Seen]]"


class Alone:
    """This process evaluates all queries.

    Attributes:
        rank: number of this process.
        count: processes in all.
    """

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def losses(self, queries: Sequence[Query], parts: Parts, evaluate: Evaluate) -> tuple[list[list[Losses]], Seen]:
        """For each part the losses at the queries, in their order, and what all evaluations together showed.

        Args:
            evaluate: gives both for queries and a part that this process is to evaluate.
        """
        found, seen = [], Seen()
        for number, closure in enumerate(parts.closures):
            losses, own = evaluate(parts.queries(queries, number), closure)
            found.append(losses)
            seen |= own
        return found, seen

    def divided(
        self, work: Callable[[Any], T], items: Sequence[Any], reach: Callable[[int], object] | None = None
    ) -> list[T]:
        """The results of a piece of work on every item, in their order. Results are what JSON can hold.

        Args:
            reach: told of how many items are done.
        """
        results = []
        for number, item in enumerate(items, start=1):
            results.append(work(item))
            if reach is not None:
                reach(number)
        return results

    def require_same(self, facts: dict[str, Any], remedy: str) -> None:
        """Raise InputError, naming the first difference, unless all processes have the same facts."""

    def compare(self, facts: dict[str, Any]) -> str | None:
        """The first difference in facts that may differ, in words."""
        return None

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag

    def first(self, make: Callable[[], T], rank: int = 0) -> T:
        """What rank 0, or another one, makes, for all; as JSON can hold it."""
        return make()

    def bytes_of(self, rank: int, make: Callable[[], bytes]) -> bytes:
        """The same for bytes, as those of a file."""
        return make()

    def own(self, folder: Path) -> Path:
        """Where this process keeps what every one of them keeps: rank 0 in the run's folder, the others in folders of their own in it."""
        return folder if self.is_first else folder / "ranks" / str(self.rank)

    def all(self, value: T) -> list[T]:
        """The values of all processes, in their order; as JSON can hold them."""
        return [value]

    def all_bytes(self, content: bytes) -> list[bytes]:
        """The bytes of all processes, in their order."""
        return [content]

    def wait(self) -> None:
        """Go on when all processes have come here."""

    def taken(self, steps: int, digest: Callable[[], str]) -> None:
        """So many steps were taken: every so many, the weights of all processes must be the same.

        Raises:
            WorkerError: they are not.
        """

    def verify(self, steps: int, digest: str) -> None:
        """Raise WorkerError unless all processes have the same weights."""

    def tell(self, error: BaseException) -> None:
        """Let the other processes know, at the next point where they exchange something, that this one stops."""
