"""L0: where a run that finds its settings begins, and how it divides its forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Share of a run's forward passes that finding learning rate and eps may take.
SHARE = 0.15
#: Held-out measurements in a run that finds its learning rate.
MEASUREMENTS = 20
#: Directions in which a scale is measured, and the evaluations that it takes: both sides, a nudge on one, and the middle.
SCALE_DIRECTIONS = 3
SCALE_EVALUATIONS = 3 * SCALE_DIRECTIONS + 1
# Learning rate and eps of the paper by the names of what is tuned, and for everything else (MeZO, appendix E.3).
_FIRST, _FIRST_ELSE = {"lora_": (1e-4, 1e-2), "prompt_encoder": (1e-2, 1e-1)}, (1e-6, 1e-3)
# Steps that are held back for the line search, and the share of a short run.
_HELD, _HELD_SHARE = 8, 0.2
# Evaluations of a line search, at most, and for which minibatches are set aside; with fewer than the last there is no search.
_TRIES, _PLANNED_TRIES, _LEAST_TRIES = 7, 5, 3
# Minibatches in each.
_MOST_BATCHES = 16
# Scales that the choice of eps measures at most, and its share of the search.
_SCALES, _SCALES_SHARE = 3, 1 / 3
# By what the rate falls behind the search where every example has a direction of its own. In the noise of such a step the spread of examples counts B
# times as much beside the gradient as in that of a shared direction, and once the answers' prior is calibrated it is what is left:
# the best rate falls some three times further (docs/log.md).
_FALL_OF_EXAMPLES = 10**0.5
# What the log says of a plan.
_LOGGED = ("held", "batches", "tries", "every")


def first_settings(names: Sequence[str]) -> tuple[float, float]:
    """Learning rate and eps to begin with, by what is tuned: the paper's (MeZO, appendix E.3)."""
    return next((found for part, found in _FIRST.items() if any(part in name for name in names)), _FIRST_ELSE)


@dataclass(frozen=True)
class Plan:
    """What a run that finds its settings sets out to do.

    Attributes:
        held: steps that are held back for the line search.
        batches: minibatches of held-out examples in a measurement.
        tries: evaluations of the line search, at most; fewer than 3 mean that there is no search.
        every: steps from one measurement to the next.
        scales: scales that the choice of eps may measure; 0: eps stays as it begins.
        fall: by what the rate that the line search found is divided for the steps that follow.
    """

    held: int
    batches: int
    tries: int
    every: int
    scales: int = 0
    fall: float = 1.0

    @classmethod
    def of(cls, steps: int, evaluations: int, *, find_eps: bool, per_example: bool = False) -> Plan:
        """For a run of so many steps of so many evaluations, of which the search takes at most :data:`SHARE`."""
        left = int(SHARE * steps * evaluations)
        scales = min(_SCALES, int(_SCALES_SHARE * left) // SCALE_EVALUATIONS) if find_eps else 0
        left -= scales * SCALE_EVALUATIONS
        batches = min(max(left // _PLANNED_TRIES, 1), _MOST_BATCHES)
        held, every = max(1, min(_HELD, int(_HELD_SHARE * steps))), max(1, steps // MEASUREMENTS)
        fall = _FALL_OF_EXAMPLES if per_example else 1.0
        return cls(held, batches, min(_TRIES, left // batches), every, scales, fall)

    @classmethod
    def read(cls, content: dict[str, Any]) -> Plan:
        """From what :meth:`content` gave, and whatever stands beside it."""
        return cls(**{name: content[name] for name in _LOGGED}, fall=content.get("fall", 1.0))

    def content(self) -> dict[str, Any]:
        """What a step log says of it, as JSON."""
        return {name: getattr(self, name) for name in _LOGGED} | ({"fall": self.fall} if self.fall != 1 else {})

    @property
    def searches(self) -> bool:
        """Whether there is a line search."""
        return self.tries >= _LEAST_TRIES

    @property
    def updates(self) -> int:
        """Updates that the line search tries, at most."""
        return self.tries * self.held if self.searches else 0
