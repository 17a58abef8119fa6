"""What a task is, and how its file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, nearest
from .metrics import CHOICE_METRICS, TEXT_METRICS

LIBRARY = Path(__file__).parent / "library"
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Example:
    """One example of a task, as text.

    Attributes:
        prompt: what the model reads.
        options: the possible continuations, for a task with answers; empty for free text.
        label: which option is right.
        target: the text to produce, for free text.
    """

    prompt: str
    options: tuple[str, ...] = ()
    label: int = -1
    target: str = ""


@dataclass(frozen=True)
class Task:
    """A declaration: where the examples are, how one becomes a prompt, what the answers are, what is measured.

    Attributes:
        name: what the task is called.
        prompt: template with ``{column}`` placeholders (``{{`` and ``}}`` are braces). Substitution only.
        label: column of the label, or of the target text when there are no answers.
        answers: label value (as text) -> continuation of the prompt; None for free text.
        metric: ``accuracy`` for answers, ``f1`` or ``exact_match`` for free text.
        files: split (``train``, ``test``) -> path of a JSON Lines or CSV file.
        hub: ``{"path": ..., "name": ..., "train": ..., "test": ...}`` of a hub data set.
        stop: free text ends here.
        max_new_tokens: longest free text that is generated.
    """

    name: str
    prompt: str
    label: str
    answers: Mapping[str, str] | None
    metric: str
    files: Mapping[str, Path] = field(default_factory=dict)
    hub: Mapping[str, str] | None = None
    stop: str = "\n"
    max_new_tokens: int = 50

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt and the label need."""
        return [*dict.fromkeys(_placeholders(self.prompt)), self.label]

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The example of one row; ``where`` names the row in messages.

        Raises:
            InputError: a column is missing or empty, or the label is not among the answers.
        """
        for column in self.columns:
            if column not in row:
                raise InputError(
                    f"{where} has no column {column!r}, which task {self.name} needs (it has {', '.join(map(str, row))})"
                    f"{nearest(column, map(str, row))}"
                )
            if row[column] is None or not str(row[column]).strip():
                raise InputError(f"{where}: column {column!r} is empty; fill it or drop the row")

        def substitute(match: re.Match[str]) -> str:
            if match[0] in ("{{", "}}"):
                return match[0][0]
            return str(row[match[1]]).strip()

        prompt = _PLACEHOLDER.sub(substitute, self.prompt)
        joint = "" if prompt[-1:].isspace() else " "
        value = str(row[self.label]).strip()
        if self.answers is None:
            return Example(prompt, target=joint + value)
        if value not in self.answers:
            raise InputError(
                f"{where}: label {value!r} is not among the answers of task {self.name} ({', '.join(self.answers)}): "
                "add it to the answers, or drop the row"
            )
        options = tuple(joint + text for text in self.answers.values())
        return Example(prompt, options, list(self.answers).index(value))


def _placeholders(prompt: str) -> list[str]:
    """The columns that a template names; an escaped brace names none."""
    return [match[1] for match in _PLACEHOLDER.finditer(prompt) if match[1] is not None]


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def get_task(name: str) -> Task:
    """A task of the package by its name, or one from a YAML file by its path.

    Raises:
        InputError: no such task or file, or a file with something wrong in it.
    """
    if name in task_names():
        return read_task(LIBRARY / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_task(path)
    raise InputError(
        f"unknown task {name!r}: choose one of {', '.join(task_names())}, or give the path of a task file (.yaml)"
        f"{nearest(name, task_names())}"
    )


_KEYS = ("name", "prompt", "label", "target", "answers", "metric", "train", "test", "hub", "stop", "max_new_tokens")


def read_task(path: Path) -> Task:
    """Read and check a task file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such task file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys such as prompt, answers, train and test")

    def fail(why: str) -> InputError:
        return InputError(f"task file {path}: {why}")

    for key in content:
        if key not in _KEYS:
            raise fail(f"unknown key {key!r} (known: {', '.join(_KEYS)}){nearest(str(key), _KEYS)}")
    for key in ("name", "label", "target", "metric", "train", "test", "stop"):
        if not isinstance(content.get(key, ""), str):
            raise fail(f"{key} must be text, got {content[key]!r}: put it in quotes")
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not _placeholders(prompt):
        raise fail('prompt must be text with at least one {column} in it, such as "{text} It was"')
    if "" in _placeholders(prompt):
        raise fail("prompt has a {} without the name of a column: name one, or write {{}} for braces")
    if "target" in content and ("answers" in content or "label" in content):
        raise fail("give either label and answers, or target (free text), not both")
    answers = content.get("answers")
    if "target" not in content:
        if not isinstance(answers, dict) or len({str(value) for value in answers}) < max(2, len(answers)):
            raise fail("answers must map at least two different label values to texts, such as {0: terrible, 1: great}")
        for value, text in answers.items():
            if not isinstance(text, str) or not text.strip():
                raise fail(f"the answer for {value!r} is {text!r}, not text: put it in quotes (YAML reads no as false)")
        answers = {str(value): text.strip() for value, text in answers.items()}
        if len(set(answers.values())) < len(answers):
            raise fail("two answers have the same text, so the model could not tell them apart")
    metrics = CHOICE_METRICS if answers else TEXT_METRICS
    metric = content.get("metric", metrics[0])
    if metric not in metrics:
        raise fail(f"metric {metric!r} does not suit it: choose {' or '.join(metrics)}")
    files = {split: path.parent / content[split] for split in ("train", "test") if split in content}
    hub = content.get("hub")
    if (hub is None) == (not files):
        raise fail("give either files (train: and test:) or a data set of the hub (hub:)")
    if hub is not None and not (isinstance(hub, dict) and {"path", "train", "test"} <= set(hub)):
        raise fail("hub must be {path: ..., train: ..., test: ...}, with name: ... for a configuration")
    max_new_tokens = content.get("max_new_tokens", 50)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise fail(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    return Task(
        name=content.get("name", path.stem),
        prompt=prompt,
        label=str(content.get("target", content.get("label", "label"))),
        answers=answers,
        metric=metric,
        files=files,
        hub={key: str(value) for key, value in hub.items()} if hub else None,
        stop=content.get("stop", "\n"),
        max_new_tokens=max_new_tokens,
    )
