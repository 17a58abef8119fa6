"""From run folders to numbers: which point of a grid is chosen, and what it scored."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..sweep import Run, Sweep, SweepFolder


@dataclass(frozen=True)
class Chosen:
    """The run that was best on the development split, among the points of one method, task and seed.

    Attributes:
        run: the run.
        metrics: what its metrics.json holds.
        metric: name of the task's metric.
        folder: where it wrote.
    """

    run: Run
    metrics: dict[str, Any]
    metric: str
    folder: Path

    def number(self, split: str, name: str) -> float:
        """What was measured on a split; NaN if it was not."""
        value = (self.metrics.get(split) or {}).get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def score(self) -> float:
        """The metric on the test split, x 100; NaN if the run did not measure it."""
        return 100 * self.number("test", self.metric)

    @property
    def dev(self) -> float:
        """The metric on the development split, x 100; NaN without one."""
        return 100 * self.number("dev", self.metric)

    @property
    def seconds_per_step(self) -> float | None:
        """Training time, without evaluations; None for a method that takes no steps."""
        seconds, steps = self.metrics.get("seconds"), self.metrics.get("steps")
        return seconds / steps if seconds is not None and steps else None

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory over that of inference in the same run; None where one is not known."""
        peak, inference = self.metrics.get("peak_memory_bytes"), self.metrics.get("inference_peak_memory_bytes")
        return peak / inference if peak and inference else None

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: the metric on the development split, then minus the loss there. The test split has no say.

        What is not a finite number loses to everything.
        """
        score, gain = self.dev, -self.number("dev", "loss")
        return (score if math.isfinite(score) else -math.inf, gain if math.isfinite(gain) else -math.inf)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl, in order of their steps; a torn last line is left out."""
        file, records = self.folder / "history.jsonl", []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            with suppress(ValueError):
                records.append(json.loads(line))
        return sorted(records, key=lambda record: record["step"])


@dataclass
class Cell:
    """One method on one task.

    Attributes:
        planned: seed -> the runs of its grid.
        chosen: one of them for each seed that has a finished one.
        unfinished: runs that have neither ended nor failed.
        failed: run and reason of each failure.
    """

    planned: dict[int, list[Run]] = field(default_factory=dict)
    chosen: list[Chosen] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    failed: list[tuple[Run, str]] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        """Test score x 100, mean over seeds; None without a finished run."""
        return mean_of(chosen.score for chosen in self.chosen)

    @property
    def std(self) -> float | None:
        """Its sample standard deviation over seeds (divisor n - 1); None below two."""
        return statistics.stdev(chosen.score for chosen in self.chosen) if len(self.chosen) > 1 else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over seeds."""
        return mean_of(chosen.seconds_per_step for chosen in self.chosen)

    @property
    def peak_memory(self) -> int | None:
        """Bytes, the largest over seeds."""
        return max((peak for chosen in self.chosen if (peak := chosen.metrics.get("peak_memory_bytes"))), default=None)

    @property
    def memory_ratio(self) -> float | None:
        """Over that of inference in the same run, the largest over seeds."""
        return max((chosen.memory_ratio for chosen in self.chosen if chosen.memory_ratio), default=None)

    @property
    def complete(self) -> bool:
        """Whether every seed has its score and nothing is still to run. A point of the grid that failed was not best."""
        return bool(self.planned) and not self.unfinished and len(self.chosen) == len(self.planned)

    def to_json(self) -> dict[str, Any] | None:
        """The numbers; None where the sweep plans nothing."""
        if not self.planned:
            return None
        return {
            "mean": self.mean,
            "std": self.std,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory_bytes": self.peak_memory,
            "memory_ratio": self.memory_ratio,
            "chosen": [
                {
                    "seed": chosen.run.seed,
                    "point": chosen.run.point,
                    "options": chosen.run.options,
                    "test": chosen.score,
                    "dev": None if math.isnan(chosen.dev) else chosen.dev,
                    "test_examples": chosen.metrics["test"].get("examples"),
                    "steps": chosen.metrics.get("steps"),
                    "folder": chosen.run.folder,
                }
                for chosen in self.chosen
            ],
            "unfinished": [run.folder for run in self.unfinished],
            "failed": [{"folder": run.folder, "reason": reason} for run, reason in self.failed],
        }


@dataclass
class Results:
    """Everything about one model of a sweep: a cell for each method and task, empty where the sweep plans none."""

    model: str
    tasks: list[str]
    metrics: dict[str, str]
    methods: list[str]
    cells: dict[tuple[str, str], Cell]

    def row(self, method: str) -> list[Cell]:
        """A method's cells, in the order of the tasks."""
        return [self.cells[method, task] for task in self.tasks]

    def average(self, method: str) -> float | None:
        """Mean over all tasks of the sweep; None unless every one has its score from every seed."""
        cells = self.row(method)
        return mean_of(cell.mean for cell in cells) if all(cell.complete for cell in cells) else None

    def to_json(self) -> dict[str, Any]:
        """The numbers of all tables."""
        return {
            "model": self.model,
            "tasks": [{"task": task, "metric": self.metrics[task]} for task in self.tasks],
            "methods": [
                {
                    "method": method,
                    "average": self.average(method),
                    "cells": {task: self.cells[method, task].to_json() for task in self.tasks},
                }
                for method in self.methods
            ],
        }


def collect(folder: Path, sweep: Sweep, model: str) -> Results:
    """Read the run folders of one model."""
    files = SweepFolder(folder)
    cells = {(method, task): Cell() for method in sweep.methods for task in sweep.tasks}
    finished: dict[tuple[str, str, int], list[Chosen]] = {}
    for run in sweep.runs:
        if run.model != model:
            continue
        cell = cells[run.method, run.task]
        cell.planned.setdefault(run.seed, []).append(run)
        metrics = files.metrics(run)
        if metrics is not None:
            metric = metrics.get("metric") or sweep.metrics[run.task]
            candidate = Chosen(run, metrics, metric, files.of(run))
            finished.setdefault((run.method, run.task, run.seed), []).append(candidate)
        elif (reason := files.failure(run)) is not None:
            cell.failed.append((run, reason))
        else:
            cell.unfinished.append(run)
    for (method, task, _), candidates in finished.items():
        cells[method, task].chosen.append(max(candidates, key=lambda candidate: candidate.rank))
    return Results(model, sweep.tasks, sweep.metrics, sweep.methods, cells)


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers that are there; None without any."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None
