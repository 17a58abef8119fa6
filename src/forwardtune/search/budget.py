"""L0: where a run that finds its settings begins, and how it divides its forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .guard import RISE

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
# Where every example has a direction of its own: the share of the found rate that is taken, how the rate rises, and how many measurements that are
# hardly worse lower it. In the noise of such a step the spread of examples counts B times as much beside the gradient as in that of a shared
# direction, and once the answers' prior is calibrated it is what is left: the first steps bear a rate that no later ones do (docs/log.md).
_OF_EXAMPLES = {"share": 10**-0.5, "rise": 1.25, "patience": 2}
# What the log says of a plan; of the second, where it is not as usual.
_LOGGED, _LOGGED_IF_CHANGED = ("held", "batches", "tries", "every"), ("share", "rise", "patience")


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
        share: of the rate that the line search found, which is taken.
        rise, patience: of the watch (:class:`.guard.Guard`).
    """

    held: int
    batches: int
    tries: int
    every: int
    scales: int = 0
    share: float = 1.0
    rise: float = RISE
    patience: int | None = None

    @classmethod
    def of(cls, steps: int, evaluations: int, *, find_eps: bool, per_example: bool = False) -> Plan:
        """For a run of so many steps of so many evaluations, of which the search takes at most :data:`SHARE`."""
        left = int(SHARE * steps * evaluations)
        scales = min(_SCALES, int(_SCALES_SHARE * left) // SCALE_EVALUATIONS) if find_eps else 0
        left -= scales * SCALE_EVALUATIONS
        batches = min(max(left // _PLANNED_TRIES, 1), _MOST_BATCHES)
        held, every = max(1, min(_HELD, int(_HELD_SHARE * steps))), max(1, steps // MEASUREMENTS)
        careful: dict[str, Any] = _OF_EXAMPLES if per_example else {}
        return cls(held, batches, min(_TRIES, left // batches), every, scales, **careful)

    @classmethod
    def read(cls, content: dict[str, Any]) -> Plan:
        """From what :meth:`content` gave, and whatever stands beside it.

        Raises:
            InputError: an earlier version wrote it, whose decisions cannot be taken again.
        """
        if "fall" in content:
            raise InputError(
                "the run was begun by an earlier version, which looked for the rate of directions of examples in another way: "
                "its log can be replayed, but not gone on with"
            )
        changed = {name: content[name] for name in _LOGGED_IF_CHANGED if name in content}
        return cls(**{name: content[name] for name in _LOGGED}, **changed)

    def content(self) -> dict[str, Any]:
        """What a step log says of it, as JSON."""
        usual = Plan(0, 0, 0, 0)
        changed = [name for name in _LOGGED_IF_CHANGED if getattr(self, name) != getattr(usual, name)]
        return {name: getattr(self, name) for name in (*_LOGGED, *changed)}

    @property
    def searches(self) -> bool:
        """Whether there is a line search."""
        return self.tries >= _LEAST_TRIES

    @property
    def updates(self) -> int:
        """Updates that the line search tries, at most."""
        return self.tries * self.held if self.searches else 0
