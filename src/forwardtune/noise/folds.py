"""Steps that were added up before they were added to the weights: while V of low-rank directions stays, they are one step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

from .definition import Update
from .structure import LowRank


@dataclass(frozen=True)
class Fold(Update):
    """Steps with the same V, for a matrix of low rank: ``theta <- round(theta + sum_k P_k V_k^T)``.

    ``P_k = sum_t sizes_t[k] U_tk / sqrt(r)`` is summed in float32, step by step. A k that has no size but 0 has no term. The number of the
    fold is that of its last step. Steps decay nothing.

    Attributes:
        parts: the steps, in order.
    """

    parts: tuple[Update, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, parts: Sequence[Update]) -> Fold:
        """One of these steps."""
        columns = zip_longest(*(part.sizes for part in parts), fillvalue=0.0)
        last = parts[-1]
        return cls(last.step, tuple(float(any(sizes)) for sizes in columns), unread=last.unread, parts=tuple(parts))


def folds_of(updates: Sequence[Update], structure: LowRank, at: Sequence[int]) -> list[Update]:
    """Steps as they were folded: at every refresh, and after so many steps each, in ascending order. What moved nothing is left out."""

    def span(update: Update) -> tuple[int, int]:
        return structure.step_of_v(update.step), bisect_right(at, update.step)

    return [Fold.of(list(parts)) for _, parts in groupby((u for u in updates if not u.is_empty), span)]
