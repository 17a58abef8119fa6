"""What one step did, in numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..noise import Update
from .estimators import Estimator, Losses
from .rule import Rule


@dataclass(frozen=True)
class StepRecord:
    """What one step did: enough to do it again without data.

    Attributes:
        step: number of the step, from 0; a word of the noise counter.
        lr: learning rate of every parameter group.
        weight_decay: weight decay of every parameter group.
        coefficients: projected gradient of every direction, NaN for one of which a loss was not finite; empty when the step was skipped.
        losses: the closure's values in the order of the estimator's queries; with a direction per example, those of the examples, query
            by query.
        loss: the mean of those that are finite; of all when the step was skipped.
        unchanged: how many weights the update left at the same stored value.
        seconds: from the start of the first evaluation to the end of the update.
        unused: ids of the tuned tensors that no evaluation of the step went through; the update left them alone.
        unread: which rows of a tensor, by id, no evaluation of the run has read up to this step, of those that were read in part: bool,
            shape (rows,), on the CPU; the update left them alone.
        examples: how many examples had directions of their own; 0: the directions were the minibatch's.
        left_out: ids of the tuned tensors that were found to have no side path since the step before; from then on steps leave them alone.
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
    examples: int = 0
    left_out: tuple[int, ...] = ()
    unread: Mapping[int, Tensor] = field(default_factory=dict, compare=False)

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


def estimated(
    step: int,
    groups: Sequence[Mapping[str, Any]],
    estimator: Estimator,
    losses: Sequence[Losses],
    clip: float | None,
    unused: tuple[int, ...],
    unread: Mapping[int, Tensor],
    unchanged: int,
    seconds: float,
) -> StepRecord:
    """The record of a step that was estimated and not taken yet.

    Args:
        groups: parameter groups, with learning rate and weight decay.
        losses: at the estimator's queries. Those that come one per example are rounded to float32, as the log keeps them.
    """
    if estimator.per_example:
        losses = [as_float32(own) for own in losses]
    coefficients = coefficients_of(estimator, losses, clip)
    values = tuple(loss for own in losses for loss in own)
    return StepRecord(
        step=step,
        lr=tuple(float(group["lr"]) for group in groups),
        weight_decay=tuple(float(group["weight_decay"]) for group in groups),
        coefficients=coefficients,
        losses=values,
        loss=mean_loss(values, skipped=not coefficients),
        unchanged=unchanged,
        seconds=seconds,
        unused=unused,
        unread=unread,
        examples=len(losses[0]) if estimator.per_example else 0,
    )


def coefficients_of(estimator: Estimator, losses: Sequence[Losses], clip: float | None) -> tuple[float, ...]:
    """The coefficients of a step, example by example, clipped to ``-clip .. clip``; none if no direction has one."""
    limit = clip or math.inf
    found = estimator.of_step([c for own in zip(*losses, strict=True) for c in estimator.coefficients(own)])
    found = [c if math.isnan(c) else min(max(c, -limit), limit) for c in found]
    return () if all(map(math.isnan, found)) else tuple(found)


def mean_loss(losses: Sequence[float], skipped: bool) -> float:
    """The mean of a step's losses that are finite; of all when the step was skipped."""
    known = losses if skipped else [loss for loss in losses if math.isfinite(loss)]
    return sum(known) / len(known)


def as_float32(losses: Losses) -> Losses:
    """The nearest float32 numbers, as the step log keeps losses that come one per example."""
    count = len(losses)
    return struct.unpack(f"<{count}f", struct.pack(f"<{count}f", *map(_within_float32, losses)))


def _within_float32(x: float) -> float:
    return x if abs(x) <= 3.4028234663852886e38 or math.isnan(x) else math.copysign(math.inf, x)


def updates_of(rule: Rule, record: StepRecord) -> list[Update]:
    """What a rule makes of a step that was not skipped, for each parameter group."""
    updates = [
        rule.plan(record.step, record.coefficients, lr, weight_decay)
        for lr, weight_decay in zip(record.lr, record.weight_decay, strict=True)
    ]
    if not record.unused and not record.unread:
        return updates
    return [replace(update, unused=frozenset(record.unused), unread=record.unread) for update in updates]
