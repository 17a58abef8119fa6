"""How much the examples of each class count in the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..errors import InputError, nearest
from .task import Task

BALANCED = "balanced"


def class_weights(specification: str, task: Task, labels: Sequence[int]) -> tuple[float, ...]:
    """A weight for every answer of a task, in their order. Their mean over the training examples is 1, so that losses keep their size.

    Args:
        specification: ``balanced``, by which every class counts as much as every other (n / (classes * n of the class)), or
            labels with weights, such as ``spam=5,ham=1``; labels that are left out have 1.
        labels: the number of the right answer of each training example.

    Raises:
        InputError: the task is no choice between fixed answers, or the specification does not suit it.
    """
    if task.answers is None:
        raise InputError(f"task {task.name} has no classes to weigh: leave class_weights out", "class_weights")
    names, counts = list(task.answers), Counter(labels)
    if specification.strip() == BALANCED:
        weights = [1 / max(1, counts[i]) for i in range(len(names))]
    else:
        given = dict(_weight(part, task, names) for part in specification.split(","))
        weights = [given.get(name, 1.0) for name in names]
    mean = sum(weights[label] for label in labels) / len(labels)
    return tuple(weight / mean for weight in weights)


def _weight(part: str, task: Task, names: list[str]) -> tuple[str, float]:
    name, separator, number = part.rpartition("=")
    label = task.label_of(name.strip())
    if label not in names or not separator:
        raise InputError(
            f"class_weights: {part.strip()!r} is no label with a weight, such as {names[0]}=2 (labels: {', '.join(names)})"
            f"{nearest(name.strip() or part.strip(), [*names, BALANCED])}"
        )
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"class_weights: the weight {number.strip()!r} of {label} is not a positive number")
    return label, weight
