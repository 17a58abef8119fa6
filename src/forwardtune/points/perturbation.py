"""What every way to evaluate at a perturbed point has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters

Closure = Callable[[], "Tensor | float"]


class ReadElsewhereError(RuntimeError):
    """A tuned weight was read on a way that ``scratch`` cannot see, so its perturbation would be missing from the loss."""


class Perturbation(ABC):
    """Moves a model to ``theta + scale * z(step, probe)`` and back.

    Use::

        with perturbation:
            perturbation.shift(step, probe, +eps)
            plus = loss()
            perturbation.shift(step, probe, -eps)
            minus = loss()

    Attributes:
        used: ids of the tuned tensors that were read inside the last block; None where that cannot be seen.
    """

    name: str

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        self.tuned = tuned
        self.noise = noise
        self.used: set[int] | None = None

    def losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[float]:
        """The closure's values at the points ``theta + scale * z(step, probe)`` of the queries, in their order.

        Raises:
            TypeError: the closure returned no number.
        """
        with self:
            return self._losses(step, queries, closure)

    def _losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[float]:
        values = []
        for probe, scale in queries:
            self.shift(step, probe, scale)
            values.append(as_loss(closure()))
        return [float(value) for value in values]  # read now: a GPU went from point to point without waiting

    @abstractmethod
    def shift(self, step: int, probe: int, scale: float) -> None:
        """Evaluate at ``theta + scale * z(step, probe)`` from now on; theta is always the unperturbed point.

        Scale 0 is theta itself, and costs no noise.
        """

    @abstractmethod
    def __enter__(self) -> Perturbation: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...


def as_loss(value: Any) -> Tensor | float:
    """What a closure returned, once it is known to be a number. A tensor is not read yet but copied: the next evaluation may
    write to it.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure returned a tensor of shape {tuple(value.shape)}: return one number, a mean")
        return value.detach().clone()
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"the closure returned {value!r}, which is not a number: return the loss") from None
