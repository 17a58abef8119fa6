"""From a log's records to the updates that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..noise import Update
from ..optimizer import StepRecord
from ..rules import RULES
from .reader import Log


@dataclass(frozen=True)
class Trajectory:
    """What replay needs of a run.

    Attributes:
        path: where it came from, for messages.
        header: the log's header.
        updates: for every parameter group, one update a step.
        digest: of the tuned weights; None when the run did not close its log.
    """

    path: Path
    header: dict[str, Any]
    updates: list[list[Update]]
    digest: str | None

    @property
    def steps(self) -> int:
        """Number of steps, skipped ones included."""
        return len(self.updates[0])


def trajectory_of(log: Log) -> Trajectory:
    """The updates that a log describes, one list for each parameter group."""
    return Trajectory(log.path, log.header, updates_of(log.header, log.records), log.end["digest"] if log.end else None)


def updates_of(header: dict[str, Any], records: Sequence[StepRecord]) -> list[list[Update]]:
    """What the run's rule made of its records: a list for each parameter group, an empty update for a skipped step."""
    rule = RULES[header["rule"]]
    return [
        [
            rule(record.step, record.coefficients, record.lr[group], record.weight_decay[group])
            if not record.skipped
            else Update(record.step, ())
            for record in records
        ]
        for group in range(len(header["groups"]))
    ]
