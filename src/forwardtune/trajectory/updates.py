"""From a log's records to the updates that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..averages import NONE, Average
from ..errors import InputError
from ..method.averaged import Averaged, summed
from ..method.record import StepRecord, updates_of
from ..method.rule import Rule
from ..noise import Update
from .format import emphasis_of
from .reader import Log, Rollback, rule_of


@dataclass(frozen=True)
class Trajectory:
    """What replay needs of a run.

    Attributes:
        path: where it came from, for messages.
        header: the log's header.
        rule: what moves the weights.
        updates: for every parameter group, one update a step, undone ones included.
        rollbacks: which steps were undone.
        folds: after how many steps each, beside every refresh, what waited was folded into the weights; None: every step moved them.
        digest: of the tuned weights; None when the run did not close its log.
        checked: whether a checksum covers every step; of an export by an early version only the digest tells damage.
        averages: digests of averages of its weights, by their texts, as far as they are known.
        average: of which its weights are meant to be taken.
    """

    path: Path
    header: dict[str, Any]
    rule: Rule
    updates: list[list[Update]]
    rollbacks: list[Rollback]
    digest: str | None
    checked: bool = True
    averages: Mapping[str, str] = field(default_factory=dict)
    average: str = NONE
    folds: Sequence[int] | None = None

    @property
    def steps(self) -> int:
        """Number of steps, skipped ones and undone ones included."""
        return len(self.updates[0])

    def averaged(self, average: str | None, steps: int) -> Trajectory:
        """The trajectory to an average of the weights of its first steps; by default to that which it names itself.

        Raises:
            InputError: the average is none of these steps, or the run is not linear in its directions.
        """
        text = self.average if average is None else average
        if text == NONE:
            return self
        if (emphasis := emphasis_of(self.header)) is not None and emphasis.limits:
            raise InputError(
                f"{self.path}: which weights the run's directions reach depends on the weights (sparsity), so their average is no sum of "
                "directions: replay its last step"
            )
        rule = Averaged(self.rule, tuple(Average(text).shares(standing(self.rollbacks, steps))))
        summed(self.rule, self.first(steps)[0], rule.shares)  # refused before any weight is read
        return replace(self, rule=rule, digest=self.averages.get(text), average=text, folds=None)

    def first(self, steps: int) -> list[list[Update]]:
        """The updates that lead to the weights after so many steps: one that was undone by then is empty, as if skipped."""
        stands = standing(self.rollbacks, steps)
        return [
            [update if stands[i] else Update(update.step, ()) for i, update in enumerate(group[:steps])]
            for group in self.updates
        ]

    def folded_at(self, steps: int) -> list[int] | None:
        """The folds within the first steps, with those of going back."""
        if self.folds is None:
            return None
        back = (rollback.to for rollback in self.rollbacks if rollback.at <= steps)
        return sorted({*(at for at in self.folds if at <= steps), *back})


def folded_steps(log: Log, steps: int) -> int:
    """After how many steps, so many at most, nothing waited to be folded into the weights: from there a run can go on."""
    if log.header.get("fold") != "refresh":
        return steps
    at = [*log.folds, *(rollback.at for rollback in log.rollbacks)]
    return max([steps - steps % int(log.header["refresh"]), *(known for known in at if known <= steps)])


def standing(rollbacks: Sequence[Rollback], steps: int) -> list[bool]:
    """Which of the first steps are in the weights after them."""
    after: list[tuple[int, list[bool]]] = [(0, [])]  # the same at the beginning and after every rollback
    for rollback in rollbacks:
        if rollback.at <= steps:
            after.append((rollback.at, _until(rollback.to, after) + [False] * (rollback.at - rollback.to)))
    return _until(steps, after)


def _until(steps: int, after: list[tuple[int, list[bool]]]) -> list[bool]:
    at, stands = next(known for known in reversed(after) if known[0] <= steps)
    return stands + [True] * (steps - at)


def trajectory_of(log: Log) -> Trajectory:
    """The updates that a log describes, one list for each parameter group."""
    rule = rule_of(log.path, log.header)
    updates = updates_by_group(rule, log.records, len(log.header["groups"]))
    end = log.end["digest"] if log.end else None
    averages = {
        note.content["average"]["of"]: note.content["average"]["digest"]
        for note in log.notes
        if "average" in note.content and note.at == log.steps
    }
    folds = log.folds if log.header.get("fold") == "refresh" else None
    return Trajectory(log.path, log.header, rule, updates, log.rollbacks, end, averages=averages, folds=folds)


def updates_by_group(rule: Rule, records: Sequence[StepRecord], groups: int) -> list[list[Update]]:
    """What the run's rule made of its records: a list for each parameter group, an empty update for a skipped step."""
    steps = [[Update(record.step, ())] * groups if record.skipped else updates_of(rule, record) for record in records]
    return [[step[group] for step in steps] for group in range(groups)]
