"""L5: the folder of a run of ``forwardtune train``: what its files are called, and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json
from .trajectory import Log, read_log

LOG = "steps.jsonl"
METRICS = "metrics.json"
OUTCOMES = "outcomes.json"
PREDICTIONS = "predictions.jsonl"
HISTORY = "history.jsonl"
COMPLETIONS = "completions.jsonl"
TERMS = "objective.jsonl"
DEV = "dev.jsonl"
#: The loss of every token of a general text, before and after.
GENERAL = "general_text.json"
#: The task file that the run was told, so that its model can be asked the same way elsewhere.
TASK = "task.yaml"
#: The adapter that a run began with, so that its step log can be replayed anywhere.
INITIAL = "initial.safetensors"

_MODEL_FILES = ("config.json", "adapter_config.json")


def forgetting(metrics: Mapping[str, Any]) -> str:
    """What ``metrics.json`` says of general text, in a sentence; nothing where none was measured before and after."""
    facts = metrics.get("general_text", {})
    if "difference" not in facts:
        return ""
    before, after = (facts[name]["perplexity"] for name in ("before", "after"))
    return (
        f"Perplexity of general text ({facts['tokens']:,} tokens of {Path(facts['text']).name}): {before:.4g} before, {after:.4g} after; "
        f"{facts['difference']:+.4f} nats a token, standard error {facts['standard_error']:.4f}"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; none if there is no file."""
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            lines.append(json.loads(line))
    except (OSError, ValueError):  # a kill tore the last line
        pass
    return lines


def is_run(path: Path) -> bool:
    """Whether a run wrote to the folder."""
    return any((path / name).is_file() for name in (LOG, METRICS))


@dataclass(frozen=True)
class RunFolder:
    """A run, finished or not."""

    path: Path

    def __post_init__(self) -> None:
        if not is_run(self.path):
            there = "holds no run" if self.path.is_dir() else "is no folder"
            raise InputError(f"{self.path} {there}: give the folder that forwardtune train wrote to")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``, empty before the run measured anything."""
        return read_json(self.path / METRICS)

    @cached_property
    def log(self) -> Log | None:
        """The step log; None for a method that keeps none. Raises LogError if it is damaged."""
        return read_log(self.path / LOG) if (self.path / LOG).is_file() else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run was told, as ``metrics.json`` or the log's header has it."""
        own = self.metrics.get("settings") or (self.log.header["run"] if self.log is not None else {})
        return own if isinstance(own, dict) else {}

    @property
    def task(self) -> str | None:
        """The task as it was named, or the copy of its file, where that is gone."""
        named = self.settings.get("task")
        if named is not None and Path(named).suffix in (".yaml", ".yml") and not Path(named).is_file():
            return str(self.path / TASK) if (self.path / TASK).is_file() else named
        return named

    @property
    def has_model(self) -> bool:
        """Whether the tuned model was saved."""
        return any((self.path / name).is_file() for name in _MODEL_FILES)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one."""
        found: Iterable[Path] = (path for path in self.path.glob("checkpoint-*") if path.name[11:].isdigit())
        return max(found, key=lambda path: int(path.name[11:]), default=None)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of its files."""
        return read_lines(self.path / name)
