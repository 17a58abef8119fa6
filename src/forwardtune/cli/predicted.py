"""The test examples as a model answered them: measurements, ``predictions.jsonl``, and what people are shown of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..predictions import answered, asked, summary
from ..run_folder import PREDICTIONS, read_lines
from ..tasks import Task
from ..tasks.encoding import Encoded
from . import say
from .results import write_lines
from .session import Session

# So many classes are shown, the worst of more.
_SHOWN = 8


@dataclass
class Examined:
    """The test split after one evaluation.

    Attributes:
        measured: the metrics.
        outcomes: the task's metric, or the reward, of every example.
        answers: what the model answered to every example (:func:`~forwardtune.predictions.answered`).
        classes: precision, recall, F1 and confusions of every class; empty for a task without classes.
    """

    measured: dict[str, float]
    outcomes: list[float]
    answers: list[dict[str, Any]]
    classes: dict[str, Any]


def examine(session: Session, what: str) -> Examined:
    """Measure the test split, with a progress bar, and keep what was answered."""
    outcomes: list[float] = []
    texts: list[str] = []
    scores: list[list[float]] = []
    measured = session.evaluate(what, outcomes=outcomes, completions=texts, scores=scores)
    task, examples = session.task, session.splits["test"]
    answers = answers_of(task, examples, outcomes, scores, texts)
    numbers, classes = summary(task, [asked(task, example).get("gold") for example in examples], answers)
    return Examined({**measured, **numbers}, outcomes, answers, classes)


def answers_of(
    task: Task, examples: Sequence[Encoded], outcomes: list[float], scores: list[list[float]], texts: list[str]
) -> list[dict[str, Any]]:
    """What was answered to each example, from what :func:`~forwardtune.evaluation.evaluate` filled."""
    said = []
    for i, example in enumerate(examples):
        own, text = scores[i] if scores else (), texts[i] if texts else None
        said.append(answered(task, example, scores=own, completion=text, outcome=outcomes[i]))
    return said


def write_predictions(
    folder: Path, session: Session, before: Sequence[Any] | None, after: Sequence[Any] | None = None
) -> None:
    """Write ``predictions.jsonl``: a line for each test example, with what the model answers and what it answered ``before``."""
    lines = []
    for number, example in enumerate(session.splits["test"]):
        line = {"example": number + 1, **asked(session.task, example)}
        line |= {} if after is None else after[number]
        lines.append(line | ({} if before is None else {"before": before[number]}))
    write_lines(folder / PREDICTIONS, lines)


def read_before(folder: Path) -> list[Any] | None:
    """What the untuned model answered, if the run in the folder kept it."""
    lines = read_lines(folder / PREDICTIONS)
    return [line["before"] for line in lines] if lines and all("before" in line for line in lines) else None


def show_classes(by_class: dict[str, Any]) -> None:
    """Show precision, recall and F1 of the classes, and which is taken for which most often."""
    if not by_class:
        return
    classes = by_class["classes"]
    names = list(classes)
    shown = names if len(names) <= _SHOWN else sorted(names, key=lambda name: classes[name]["f1"])[:_SHOWN]
    say()
    say(
        f"{f'lowest {_SHOWN} of {len(names)}' if len(names) > _SHOWN else 'class':24}   precision      recall          F1    examples"
    )
    for name in shown:
        one = classes[name]
        say(f"{name:24.24}{one['precision']:12.4f}{one['recall']:12.4f}{one['f1']:12.4f}{one['examples']:12}")
    count, gold, answer = max(
        (count, gold, answer)
        for gold, row in zip(names, by_class["confusion"], strict=True)
        for answer, count in zip(names, row, strict=True)
        if gold != answer
    )
    if count:
        say(f"most often confused: {count} of {classes[gold]['examples']} {gold!r} were answered {answer!r}")
