"""What one step did, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..noise import Update
from .rule import Rule


@dataclass(frozen=True)
class StepRecord:
    """What one step did: enough to do it again without data.

    Attributes:
        step: number of the step, from 0; a word of the noise counter.
        lr: learning rate of every parameter group.
        weight_decay: weight decay of every parameter group.
        coefficients: projected gradient of every probe, NaN for one of which a loss was not finite; empty when the step was skipped.
        losses: the closure's values in the order of the estimator's queries.
        loss: the mean of those that are finite; of all when the step was skipped.
        unchanged: how many weights the update left at the same stored value.
        seconds: from the start of the first evaluation to the end of the update.
        unused: ids of the tuned tensors that no evaluation of the step went through; the update left them alone.
    """

    step: int
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    loss: float
    unchanged: int
    seconds: float
    unused: tuple[int, ...] = ()

    @property
    def skipped(self) -> bool:
        """True when no probe had finite losses and the weights were left alone."""
        return not self.coefficients

    @property
    def present(self) -> tuple[float, ...]:
        """The coefficients of the probes whose losses were finite."""
        return tuple(c for c in self.coefficients if not math.isnan(c))

    @property
    def flat(self) -> bool:
        """True when every coefficient is 0: all probes gave the same loss, as accuracies often do."""
        return not self.skipped and not any(self.present)


def updates_of(rule: Rule, record: StepRecord) -> list[Update]:
    """What a rule makes of a step that was not skipped, for each parameter group."""
    updates = [
        rule.plan(record.step, record.coefficients, lr, weight_decay)
        for lr, weight_decay in zip(record.lr, record.weight_decay, strict=True)
    ]
    return [replace(update, unused=frozenset(record.unused)) for update in updates] if record.unused else updates
