"""The strips of several tensors as columns of numbers, for kernels that draw all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .definition import Strips


class Columns(NamedTuple):
    """A number for every strip. ``places`` has one more: where each begins in a flat result, and where the last one ends."""

    tensors: np.ndarray
    steps: np.ndarray
    probes: np.ndarray
    starts: np.ndarray
    scales: np.ndarray
    counts: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, many: Sequence[Strips]) -> Columns:
        """Words are uint32, places int64, scales float64."""
        numbers = [len(each.probes) for each in many]
        counts = np.repeat(np.array([each.length for each in many], np.int64), numbers)
        places = np.zeros(len(counts) + 1, np.int64)
        counts.cumsum(out=places[1:])
        tensors = np.repeat(np.array([each.tensor for each in many], np.uint32), numbers)

        def column(name: str, dtype: Any) -> np.ndarray:
            values = [getattr(each, name) for each in many]
            if all(len(value) == 1 for value in values):
                return np.repeat(np.array([value[0] for value in values], dtype), numbers)
            filled, lo = np.empty(len(counts), dtype), 0
            for value, number in zip(values, numbers, strict=True):
                filled[lo : lo + number] = value
                lo += number
            return filled

        words = column("steps", np.uint32), column("probes", np.uint32)
        return cls(tensors, *words, column("starts", np.int64), column("scales", np.float64), counts, places)


def split(out: Tensor, many: Sequence[Strips]) -> list[Tensor]:
    """The parts of a flat result, each of shape ``(number of probes, length)``."""
    parts = out.split([each.length * len(each.probes) for each in many])
    return [part.view(len(each.probes), each.length) for part, each in zip(parts, many, strict=True)]
