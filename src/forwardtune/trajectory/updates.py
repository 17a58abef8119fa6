"""From a log's records to the updates that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..noise import Update
from ..optimizer import StepRecord
from ..rules import Rule
from .reader import Log, rule_of


@dataclass(frozen=True)
class Trajectory:
    """What replay needs of a run.

    Attributes:
        path: where it came from, for messages.
        header: the log's header.
        rule: what moves the weights.
        updates: for every parameter group, one update a step.
        digest: of the tuned weights; None when the run did not close its log.
    """

    path: Path
    header: dict[str, Any]
    rule: Rule
    updates: list[list[Update]]
    digest: str | None

    @property
    def steps(self) -> int:
        """Number of steps, skipped ones included."""
        return len(self.updates[0])


def trajectory_of(log: Log) -> Trajectory:
    """The updates that a log describes, one list for each parameter group."""
    return part_of(log, log.records, log.end["digest"] if log.end else None)


def part_of(log: Log, records: Sequence[StepRecord], digest: str | None = None) -> Trajectory:
    """The same for some of its records."""
    rule = rule_of(log.path, log.header)
    return Trajectory(log.path, log.header, rule, updates_of(rule, records, len(log.header["groups"])), digest)


def updates_of(rule: Rule, records: Sequence[StepRecord], groups: int) -> list[list[Update]]:
    """What the run's rule made of its records: a list for each parameter group, an empty update for a skipped step."""
    return [
        [
            rule.plan(record.step, record.coefficients, record.lr[group], record.weight_decay[group])
            if not record.skipped
            else Update(record.step, ())
            for record in records
        ]
        for group in range(groups)
    ]
