"""L5: what a model answered to every example, and what that says of each class and of the model's confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import InputError
from .tasks import Task, metrics
from .tasks.encoding import Encoded
from .tasks.task import Example
from .tasks.template import Fields

# Of the reliability diagram of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
_BINS = 15


def option_names(task: Task, example: Encoded) -> list[str]:
    """What the options of an example are called in predictions: the data's labels where the task has answers, else the texts."""
    if task.preference is not None:
        return ["chosen", "rejected"]
    if task.answers is not None:
        return list(task.answers)
    return [text.strip() for text in example.example.options]


def asked(task: Task, example: Encoded) -> dict[str, Any]:
    """``{"input": prompt, "gold": the right answer}``; several right answers are a list, and without one there is no gold."""
    if task.conversational:
        return {"input": example.example.prompt}
    if task.free_text:
        gold = list(example.texts)
    else:
        names = option_names(task, example)
        gold = [names[i] for i in example.right]
    return {"input": example.example.prompt, **({"gold": gold[0] if len(gold) == 1 else gold} if gold else {})}


def answered(
    task: Task, example: Encoded, *, scores: Sequence[float] = (), completion: str | None = None, outcome: float = 0.0
) -> dict[str, Any]:
    """What the model made of one example.

    Args:
        scores: of its options, as :func:`~forwardtune.evaluation.evaluate` fills them: length-normalised log-likelihoods, or
            the margin of a preference.
        completion: what the model wrote, for free text.
        outcome: the task's metric, or the reward, of this example.

    Returns:
        For a choice ``answer``, its ``confidence`` (softmax of the scores), all ``scores`` by name and ``right``; for a
        preference ``answer``, ``margin`` and ``right``; for free text ``completion``, ``score`` and, where there is a target,
        ``right``: whether it is the target but for case, punctuation and articles.
    """
    if task.conversational:
        return {"token_accuracy": outcome}
    if task.free_text:
        line: dict[str, Any] = {"completion": completion, "score": outcome}
        if example.texts and completion is not None:
            line["right"] = any(metrics.exact_match(completion, text) for text in example.texts)
        return line
    names = option_names(task, example)
    if task.preference is not None:
        return {"answer": names[0 if outcome else 1], "margin": scores[0], "right": bool(outcome)}
    own = list(scores)[: len(names)]
    best = int(np.argmax(own))
    shares = np.exp(np.array(own) - max(own))
    return {
        "answer": names[best],
        "confidence": float(shares[best] / shares.sum()),
        "scores": dict(zip(names, own, strict=True)),
        "right": bool(outcome),
    }


def question(task: Task, row: Mapping[str, Any], where: str) -> Example:
    """The example of a row that need not have a label. Its right answer, where one must be named, means nothing.

    Raises:
        RowError: a column that the prompt or the answers need is missing or empty; ``where`` names the row.
        InputError: the task prefers texts, and so has no answer to give.
    """
    if task.conversational:
        raise InputError("conversations have no answer to predict: use forwardtune generate, or chat")
    if task.preference is not None:
        raise InputError(f"task {task.name} prefers one text to another: it has no answer to predict")
    if task.free_text:
        return replace(task, label="").example(row, where)
    label = next(iter(task.answers)) if task.answers is not None else None
    if task.options is not None:
        label = Fields(row, where, task.name).value(task.options[0])
    return task.example({**row, task.label: label}, where)


def summary(
    task: Task, golds: Sequence[Any], lines: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers beside the accuracy, and facts of each class, of what :func:`answered` gave.

    Returns:
        ``{"macro_f1": ..., "calibration_error": ...}``, as far as they have a meaning, and :func:`by_class` of a task whose
        examples have the same answers, else nothing.
    """
    if task.free_text or task.conversational or task.preference is not None or not lines:
        return {}, {}
    confidence = calibration_error([line["confidence"] for line in lines], [line["right"] for line in lines])
    if task.answers is None:
        return {"calibration_error": confidence}, {}
    classes = by_class(list(task.answers), list(golds), [line["answer"] for line in lines])
    return {"macro_f1": classes["macro_f1"], "calibration_error": confidence}, classes


def by_class(names: Sequence[str], gold: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and the confusion matrix.

    A quotient of nothing is 0, as in scikit-learn. The macro F1 is the mean over the classes that are right or answered
    somewhere.

    Returns:
        ``{"classes": {name: {"precision", "recall", "f1", "examples"}}, "macro_f1": ..., "confusion": counts}``, in which
        ``counts[i][j]`` examples of class i were answered with class j, in the order of the names.
    """
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, ([place[name] for name in gold], [place[name] for name in answers]), 1)
    right, there, taken = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    precision, recall, f1 = (_share(right, taken), _share(right, there), _share(2 * right, there + taken))
    seen = (there + taken) > 0
    classes = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for name, p, r, f, n in zip(names, precision, recall, f1, there, strict=True)
    }
    return {
        "classes": classes,
        "macro_f1": float(f1[seen].mean()) if seen.any() else math.nan,
        "confusion": counts.tolist(),
    }


def _share(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """How far confidence and accuracy are apart: ``sum_b n_b / n * |accuracy_b - confidence_b|`` over bins of equal width.

    Few examples make it larger than it is. Source: Guo et al. (2017), equation 3.
    """
    values, hits = np.array(confidence, dtype=float), np.array(right, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return math.nan
    which = np.clip(np.ceil(values * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = [abs(hits[which == b].sum() - values[which == b].sum()) for b in range(_BINS)]
    return float(sum(gaps) / len(values))
