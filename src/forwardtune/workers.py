"""L2: who evaluates which query of a step, and how the losses come together. Scalars are all that is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .method.estimators import Losses, Query

Evaluate = Callable[[Sequence[Query]], "tuple[list[Losses], set[int]]"]


class Alone:
    """This process evaluates all queries."""

    def losses(self, queries: Sequence[Query], evaluate: Evaluate) -> tuple[list[Losses], set[int]]:
        """The losses at the queries, in their order, and the ids of the tuned tensors that were read.

        Args:
            evaluate: gives both for the queries that this process is to evaluate.
        """
        return evaluate(queries)
