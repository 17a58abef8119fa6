"""Strips as columns of numbers, for kernels that draw all of them in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .definition import Places, Strips


class Columns(NamedTuple):
    """A number for every strip. ``places`` has one more: where each begins in a flat result, and where the last one ends."""

    tensors: np.ndarray
    steps: np.ndarray
    probes: np.ndarray
    starts: np.ndarray
    scales: np.ndarray
    places: np.ndarray

    @classmethod
    def of(
        cls,
        tensors: Sequence[int],
        steps: Sequence[int],
        probes: Places,
        starts: Places,
        scales: Sequence[float],
        length: int,
    ) -> Columns:
        """Strips of one length: those of the first tensor first. Words are uint32, places int64, scales float64."""
        number = len(probes)

        def column(values: Any, dtype: Any) -> np.ndarray:
            return np.tile(np.broadcast_to(np.asarray(values, dtype), number), len(tensors))

        places = np.arange(len(tensors) * number + 1, dtype=np.int64) * length
        return cls(
            np.repeat(np.array(tensors, np.uint32), number),
            *(column(steps, np.uint32), column(probes, np.uint32)),
            *(column(starts, np.int64), column(scales, np.float64), places),
        )

    @classmethod
    def of_many(cls, many: Sequence[Strips]) -> Columns:
        """All of them, one after the other."""
        each = [cls.of(s.tensors, s.terms.steps, s.terms.probes, [s.start], s.terms.scales, s.length) for s in many]
        if not each:
            return cls.of((), (0,), (), (0,), (0.0,), 0)
        ends = np.cumsum([0, *(columns.places[-1] for columns in each)])
        places = [columns.places[:-1] + end for columns, end in zip(each, ends, strict=False)]
        tensors, steps, probes, starts, scales, _ = (np.concatenate(part) for part in zip(*each, strict=True))
        return cls(tensors, steps, probes, starts, scales, np.concatenate([*places, ends[-1:]]))


def split(out: Tensor, many: Sequence[Strips]) -> list[Tensor]:
    """The parts of a flat result, each of shape ``(number of tensors, number of probes, length)``."""

    def parts() -> Iterator[Tensor]:
        lo = 0
        for each in many:
            shape = len(each.tensors), len(each.terms.probes), each.length
            count = shape[0] * shape[1] * shape[2]
            yield out[lo : lo + count].view(shape)
            lo += count

    return list(parts())
