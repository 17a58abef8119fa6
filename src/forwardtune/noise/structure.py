"""Directions of low rank: a matrix's z is a product of two thin factors, so a side path can multiply with them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError


@dataclass(frozen=True)
class LowRank:
    """``Z = U V^T / sqrt(rank)`` for the tensors that are large enough; others keep full directions.

    A tensor of shape (..., n) is a matrix of m rows, m the product of its leading dimensions. U (m, rank) and V (n, rank)
    hold entries of the run's direction.

    Attributes:
        rank: number of columns of U and V.
        refresh: V is drawn anew every so many steps, U in every step.

    Raises:
        InputError: an argument that is not an integer of at least 1.
    """

    rank: int
    refresh: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"the {name} of a low-rank direction must be an integer of at least 1, got {value!r}")

    def applies(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has directions of low rank: if the factors are smaller than the tensor."""
        height, width = rows_and_columns(shape)
        return len(shape) >= 2 and self.rank * (height + width) < height * width

    def step_of_v(self, step: int) -> int:
        """The step at which V is drawn."""
        return step - step % self.refresh

    def scale(self, scale: float) -> float:
        """What the entries of U are scaled with, for ``scale * Z``."""
        return scale / math.sqrt(self.rank)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """m and n of a tensor: all dimensions but the last, and the last."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


class Rows(NamedTuple):
    """The rows of a matrix that a piece of a tensor lies in.

    Attributes:
        start: the piece's first element, in the tensor.
        first, number: the first of the rows, and how many they are.
        height, width: of the tensor.
    """

    tensor: int
    start: int
    first: int
    number: int
    height: int
    width: int

    @classmethod
    def of(cls, tensor: int, shape: Sequence[int], start: int, numel: int) -> Rows:
        height, width = rows_and_columns(shape)
        first = start // width
        return cls(tensor, start, first, -(-(start + numel) // width) - first, height, width)
