"""What one run left, as a report shows it: its course step by step, its settings and what it answered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from ...config.repeat import repeat_command
from ...run_folder import COMPLETIONS, DEV, HISTORY, PREDICTIONS, RunFolder, forgetting

# Examples that are shown.
_SAMPLES = 12


@dataclass(frozen=True)
class Course:
    """A run, finished or not, in columns: one value for each step, NaN where there is none.

    Attributes:
        name: what it is called beside others.
    """

    run: RunFolder
    name: str

    @cached_property
    def _history(self) -> list[dict[str, Any]]:
        """Steps of a method that keeps no step log."""
        return [line for line in self.run.lines(HISTORY) if "loss" in line]

    @property
    def steps(self) -> list[int]:
        count = self.run.log.steps if self.run.log is not None else len(self._history)
        return list(range(1, count + 1))

    @cached_property
    def seconds(self) -> list[float]:
        """Of training, up to the end of each step."""
        if self.run.log is None:
            return [line.get("seconds", math.nan) for line in self._history]
        return list(accumulate(record.seconds for record in self.run.log.records))

    @property
    def loss(self) -> list[float]:
        if self.run.log is None:
            return [math.nan if line["loss"] is None else line["loss"] for line in self._history]
        return [record.loss for record in self.run.log.records]

    @property
    def projected(self) -> list[float]:
        """The root mean square of a step's projected gradients; NaN where it was skipped."""
        records = self.run.log.records if self.run.log is not None else []
        return [_root_mean_square(record.coefficients) for record in records]

    @property
    def rates(self) -> list[float]:
        return [max(record.lr) for record in self.run.log.records] if self.run.log is not None else []

    @property
    def rollbacks(self) -> list[tuple[int, int]]:
        """``(after so many steps, back to so many)``."""
        return [(back.at, back.to) for back in self.run.log.rollbacks] if self.run.log is not None else []

    @property
    def unchanged(self) -> list[float]:
        """The share of the tuned weights that each step left at the same stored value; NaN where it was skipped."""
        if self.run.log is None:
            return []
        weights = sum(math.prod(tensor["shape"]) for tensor in self.run.log.header["tensors"])
        return [math.nan if r.skipped else r.unchanged / weights for r in self.run.log.records]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """``{"step", "seconds", "dev"}`` of every measurement of the development split."""
        seconds = [0.0, *self.seconds]
        lines = [line for line in self.run.lines(DEV) if line["step"] < len(seconds)]
        return [{**line, "seconds": seconds[line["step"]]} for line in lines]

    @property
    def metric(self) -> str:
        return str(self.run.metrics.get("metric", "accuracy"))

    @property
    def settings(self) -> dict[str, Any]:
        return self.run.settings

    @property
    def command(self) -> str:
        """What does the run again; nothing for one that a program of its own began."""
        return repeat_command(self.settings) if "task" in self.settings else ""

    @property
    def samples(self) -> list[dict[str, Any]]:
        """A few test examples with what was answered before and after: those first that flipped, then as they come."""
        lines = [line for line in self.run.lines(PREDICTIONS) if "answer" in line or "completion" in line]
        flipped = [line for line in lines if "right" in line and line["right"] != line.get("before", line).get("right")]
        mended, broken = ([line for line in flipped if line["right"] is right] for right in (True, False))
        rest = [line for line in lines if line not in flipped]
        chosen = [*mended[: _SAMPLES // 2], *broken[: _SAMPLES // 3]]
        return [*chosen, *rest][:_SAMPLES]

    @property
    def written(self) -> list[dict[str, Any]]:
        """What the model wrote while it was tuned, where that was logged."""
        return [line for line in self.run.lines(COMPLETIONS) if line.get("split") == "train"][-_SAMPLES:]

    @property
    def state(self) -> str:
        """Whether it is done."""
        if "test" in self.run.metrics:
            return "finished"
        return f"not finished: {len(self.steps)} of {self.settings.get('steps', '?')} steps"

    @property
    def forgetting(self) -> str:
        """What the run says of general text, in a sentence; nothing if it did not measure any."""
        return forgetting(self.run.metrics)

    @property
    def flips(self) -> tuple[int, int]:
        """How many test examples came out better and worse than before."""
        test = self.run.metrics.get("sign_test", {})
        return int(test.get("better", 0)), int(test.get("worse", 0))


def _root_mean_square(values: tuple[float, ...]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.sqrt(sum(value * value for value in known) / len(known)) if known else math.nan
