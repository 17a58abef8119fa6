"""L0: averages of a run's weights, as people write them, and how much each of its weights counts in them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError

#: In place of an average: the weights of the run itself, or whichever is best on held-out examples.
NONE, AUTO = "none", "auto"
FORMS = "last:200, steps:100-300, steps:100- or ema:0.99"


@dataclass(frozen=True)
class Average:
    """Which weights of a run are averaged, and how. The weights after n steps are those with which the run went on after them.

    ==============  =====================================================================================================
    ``last:N``      the mean of the weights after each of the last N steps (Polyak)
    ``last:P%``     the same over the last P percent of the steps
    ``steps:A-B``   the mean of the weights after A, A + 1, ... B steps; without B up to the end; 0 is the base
    ``ema:BETA``    ``e_1 = theta_1``, ``e_t = BETA e_{t-1} + (1 - BETA) theta_t`` after each step
    ==============  =====================================================================================================

    Steps that were undone count for nothing. A step that was skipped counts with the weights that it left as they were.

    Attributes:
        text: as it was written.
    """

    text: str

    def __post_init__(self) -> None:
        self._read(1000)

    def shares(self, stands: Sequence[bool]) -> list[float]:
        """How much the weights after 0, 1, 2, ... steps count; together they count 1.

        Args:
            stands: for every step whether it is in the weights that the run ended with.

        Raises:
            InputError: there are not so many steps, or none of those that are named stands.
        """
        after = [0, *(step + 1 for step, there in enumerate(stands) if there)]  # 0: the base
        shares = [0.0] * (len(stands) + 1)
        kind, *numbers = self._read(len(after) - 1)
        if kind == "ema":
            beta, share = numbers[0], 1.0
            for step in reversed(after[2:]):
                shares[step], share = (1 - beta) * share, beta * share
            shares[after[1] if len(after) > 1 else 0] = share
            return shares
        if kind == "last":
            wanted, chosen = int(numbers[0]), after[1:][-int(numbers[0]) :]
            enough = len(chosen) == wanted
        else:
            last = len(stands) if math.isinf(numbers[1]) else int(numbers[1])
            wanted, chosen = last, [step for step in after if numbers[0] <= step <= last]
            enough = bool(chosen) and last <= len(stands)
        if not enough:
            raise InputError(
                f"the average {self.text} needs {max(1, wanted)} steps, and the run kept {len(after) - 1} of {len(stands)}: average others"
            )
        for step in chosen:
            shares[step] = 1 / len(chosen)
        return shares

    def _read(self, steps: int) -> tuple[str, float] | tuple[str, float, float]:
        """Kind and numbers, for a run of so many steps."""
        if found := re.fullmatch(r"last:(\d+)(%?)", self.text):
            number = int(found[1])
            if 0 < number <= (100 if found[2] else number):
                return "last", max(1, round(number * steps / 100)) if found[2] else number
        if found := re.fullmatch(r"steps:(\d+)-(\d*)", self.text):
            first, last = int(found[1]), float(found[2] or math.inf)
            if first <= last:
                return "steps", first, last
        if (found := re.fullmatch(r"ema:(0?\.\d+)", self.text)) and 0 < float(found[1]) < 1:
            return "ema", float(found[1])
        raise InputError(f"{self.text!r} is no average of weights: write {FORMS}")


def candidates(steps: int) -> list[str]:
    """The averages of a run that kept so many steps among which ``auto`` chooses: over its last quarter, its last half, and all of it."""
    return [f"last:{count}" for count in sorted({steps // 4, steps // 2, steps}) if count > 1]


def average_or_none(text: str) -> str:
    """The text of an average, or ``none``. Raises InputError for anything else."""
    return text if text == NONE else Average(text).text


def average_or_auto(text: str) -> str:
    """The text of an average, ``none``, or ``auto``. Raises InputError for anything else."""
    return text if text == AUTO else average_or_none(text)
