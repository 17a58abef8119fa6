"""L2: where the loss is queried, and how the losses become coefficients.

An estimator is a declaration: :meth:`Estimator.queries` lists points ``theta + scale * z_probe``, and
:meth:`Estimator.coefficients` turns the losses there into one projected gradient per probe. It knows nothing of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Query(NamedTuple):
    """One evaluation of the loss, at ``theta + scale * z_probe``."""

    probe: int
    scale: float


class Estimator(ABC):
    """Gradient estimate ``g = mean_k c_k z_k`` from the losses at the queried points."""

    name: str
    eps: float
    probes: int

    @abstractmethod
    def queries(self) -> Sequence[Query]:
        """The points of one step, in the order in which they are evaluated."""

    @abstractmethod
    def coefficients(self, losses: Sequence[float]) -> list[float]:
        """One coefficient ``c_k`` for each probe from the losses at :meth:`queries`."""


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided simultaneous perturbation, ``c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)``.

    With ``probes`` = n > 1 this is n-SPSA: the estimate is the mean of ``c_k z_k`` over n directions.

    Attributes:
        eps: perturbation scale, in units of the weights.
        probes: n, the number of directions; a step costs 2 n evaluations.

    Source: MeZO, section 2 (definition 1) and appendix A; Spall, IEEE TAC 37(3), 1992.
    """

    eps: float = 1e-3
    probes: int = 1
    name = "spsa"

    def __post_init__(self) -> None:
        if not (isinstance(self.eps, (int, float)) and 0 < self.eps < float("inf")):
            raise ValueError(f"eps must be a positive number, got {self.eps!r}: MeZO's default is 1e-3")
        if not (isinstance(self.probes, int) and self.probes >= 1):
            raise ValueError(f"probes must be an integer of at least 1, got {self.probes!r}")

    def queries(self) -> list[Query]:
        return [Query(probe, sign * self.eps) for probe in range(self.probes) for sign in (+1.0, -1.0)]

    def coefficients(self, losses: Sequence[float]) -> list[float]:
        return [(plus - minus) / (2 * self.eps) for plus, minus in zip(losses[0::2], losses[1::2], strict=True)]
