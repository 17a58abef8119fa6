"""L0: how a run that finds its settings divides its forward passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .auto import MEASUREMENTS, SHARE

# Steps that are held back for the line search, and the share of a short run.
_HELD, _HELD_SHARE = 8, 0.2
# Evaluations of a line search, at most, and for which minibatches are set aside; with fewer than the last there is no search.
_TRIES, _PLANNED_TRIES, _LEAST_TRIES = 7, 5, 3
# Minibatches in each.
_MOST_BATCHES = 16
# Scales that the choice of eps measures at most, and its share of the search.
_SCALES, _SCALES_SHARE = 3, 1 / 3
#: Directions in which a scale is measured, and the evaluations that it takes: both sides, a nudge on one, and the middle.
SCALE_DIRECTIONS = 3
SCALE_EVALUATIONS = 3 * SCALE_DIRECTIONS + 1


@dataclass(frozen=True)
class Budget:
    """How a run's forward passes are divided.

    Attributes:
        held: steps that are held back for the line search.
        batches: minibatches of held-out examples.
        tries: evaluations of the line search; fewer than 3 mean that there is no search.
        scales: scales that the choice of eps may measure; 0: eps stays as it begins.
    """

    held: int
    batches: int
    tries: int
    scales: int

    @property
    def searches(self) -> bool:
        """Whether there is a line search."""
        return self.tries >= _LEAST_TRIES

    @property
    def updates(self) -> int:
        """Updates that the line search tries, at most."""
        return self.tries * self.held if self.searches else 0

    @classmethod
    def of(cls, steps: int, evaluations: int, *, find_eps: bool) -> Budget:
        """For a run of so many steps of so many evaluations, of which the search takes at most :data:`SHARE`."""
        left = int(SHARE * steps * evaluations)
        scales = min(_SCALES, int(_SCALES_SHARE * left) // SCALE_EVALUATIONS) if find_eps else 0
        left -= scales * SCALE_EVALUATIONS
        batches = min(max(left // _PLANNED_TRIES, 1), _MOST_BATCHES)
        return cls(max(1, min(_HELD, int(_HELD_SHARE * steps))), batches, min(_TRIES, left // batches), scales)


@dataclass(frozen=True)
class Plan:
    """What a run that finds its learning rate sets out to do, as its log says.

    Attributes:
        held: steps that are held back for the line search.
        batches: minibatches of held-out examples in a measurement.
        tries: evaluations of the line search.
        every: steps from one measurement to the next.
    """

    held: int
    batches: int
    tries: int
    every: int

    @property
    def searches(self) -> bool:
        """Whether there is a line search."""
        return self.tries >= _LEAST_TRIES

    @classmethod
    def of(cls, steps: int, budget: Budget) -> Plan:
        """For a run of so many steps."""
        return cls(budget.held, budget.batches, budget.tries, max(1, steps // MEASUREMENTS))

    @classmethod
    def read(cls, content: dict[str, Any]) -> Plan:
        """From what :meth:`content` gave, and whatever stands beside it."""
        return cls(*(content[name] for name in cls.__dataclass_fields__))

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
