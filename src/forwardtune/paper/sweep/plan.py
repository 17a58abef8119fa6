"""What a sweep is: its runs, each one command line and one folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        folder: where it writes, relative to the sweep's folder.
        command: ``eval``, ``probe`` or ``train``.
        model: as in the sweep file.
        task: as in the sweep file.
        method: the method's name in the sweep file.
        seed: its ``--seed``.
        point: the options that the method has a list of, with this run's values.
        options: every option, ``point`` included, by its command-line name; a flag is True.
    """

    folder: str
    command: str
    model: str
    task: str
    method: str
    seed: int
    point: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How people tell it from others: ``sst2, MeZO, lr 1e-5, seed 0``."""
        values = [f"{name} {show(value)}" for name, value in self.point.items()]
        return ", ".join([label(self.task), self.method, *values, f"seed {self.seed}"])

    @property
    def asked(self) -> dict[str, Any]:
        """What decides its result. Where the data lie does not."""
        options = {name: value for name, value in self.options.items() if name != "data-dir"}
        return {"command": self.command, "model": self.model, "task": self.task, "seed": self.seed, "options": options}

    def arguments(self, output_dir: str, model: str | None = None) -> list[str]:
        """The command line after ``forwardtune``; ``model`` stands in for the sweep file's."""
        line = [self.command, "--model", model or self.model, "--task", self.task, "--seed", str(self.seed)]
        for name, value in self.options.items():
            line += [f"--{name}"] if value is True else [f"--{name}", show(value)]
        return [*line, "--output-dir", output_dir]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked and laid out.

    Attributes:
        name: for titles, and for the folder.
        models: one table each.
        tasks: the columns, as in the file.
        metrics: task -> name of its metric.
        methods: the rows.
        keep_models: whether the weights of finished runs stay on the disk.
        runs: every run, in the order in which they are done.
    """

    name: str
    models: list[str]
    tasks: list[str]
    metrics: dict[str, str]
    methods: list[str]
    keep_models: bool
    runs: list[Run]

    def to_json(self) -> dict[str, Any]:
        """What ``sweep.json`` holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sweep:
        """The inverse. Raises KeyError or TypeError for content that is no sweep."""
        return cls(**{**content, "runs": [Run(**run) for run in content["runs"]]})


def show(value: object) -> str:
    """An option's value as people write it: ``1e-4`` and not ``0.0001``, exact to the last bit."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{Decimal(str(value)).normalize():e}"
    return str(value).replace("e+", "e") if isinstance(value, float) else str(value)


def label(name: str) -> str:
    """What a task or model is called in tables: of a path, the file's name."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return last.rsplit(".", 1)[0] if last.endswith((".yaml", ".yml", ".gguf")) else last


def slug(text: str) -> str:
    """A name for a folder: ``MeZO (LoRA)`` -> ``mezo-lora``. Different texts may get the same one."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "-"


def folder_of(parts: Sequence[str], point: dict[str, Any], seed: int) -> str:
    """``sst2/mezo/lr-1e-5/seed-0``; a method without a list has no third level."""
    values = "_".join(f"{name}-{slug(show(value))}" for name, value in point.items())
    return "/".join([*map(slug, parts), *([values] if values else []), f"seed-{seed}"])
