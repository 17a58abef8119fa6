"""What is measured on held-out examples. Free text is scored by the published rules of SQuAD v1.1 and DROP.

Both know several true answers to a question (of several annotators), and the best agreement counts. In DROP an answer
may itself consist of several spans, which must all be given.

The column ``answers_spans`` of the hub's DROP (``ucinlp/drop``) is a flat list, without a border between annotators or
between the spans of one answer. In its ``validation`` they are mostly what several annotators answered, so every span is
an alternative answer, as in the code of the MeZO paper: ``score("drop_f1", prediction, row["answers_spans"]["spans"])``.
A row of ``train`` has one annotator: several spans there are the parts of one answer: ``[tuple(spans)]``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import InputError, nearest

#: One answer: a text, or the texts of an answer with several spans.
Answer = str | Sequence[str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(metric: str, prediction: Answer, truths: Sequence[Answer]) -> float:
    """How well a prediction agrees with the true answer that it agrees with best, from 0 to 1.

    ``metric`` is one of ``TEXT_METRICS``. For those of DROP each answer may be several texts, one a span.

    Raises:
        InputError: an unknown metric, or no true answer.
    """
    if metric not in _SCORERS:
        raise InputError(f"unknown metric {metric!r}: choose one of {', '.join(_SCORERS)}{nearest(metric, _SCORERS)}")
    if isinstance(truths, str) or not truths:
        raise InputError(f"truths must be a list with at least one answer, got {truths!r}: give the answers as a list")
    return max(_SCORERS[metric](prediction, truth) for truth in truths)


def related(metric: str) -> tuple[str, ...]:
    """The metrics by the same rules: F1 and exact match go together."""
    return tuple(name for name in _SCORERS if name.startswith("drop_") == metric.startswith("drop_"))


# --- SQuAD -------------------------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD v1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both are the same once normalised, else 0.0."""
    return float(normalize(prediction) == normalize(truth))


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, counted with repetition.

    Two texts of which normalisation leaves nothing, such as "A" and "A.", agree. The script of SQuAD v1.1 gives them
    an exact match and an F1 of 0; that of SQuAD 2.0 mends it.
    """
    predicted, true = normalize(prediction).split(), normalize(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))


# --- DROP --------------------------------------------------------------------------------------------------------


def drop_normalize(text: str) -> str:
    """As SQuAD's, but hyphens part words, and numbers are numbers: "1,000" and "1000.0" are the same.

    A word that is a number keeps its point and sign; another loses its punctuation, and may be a number then ("$5").
    """
    words = [_drop_word(word) for word in re.split("[ -]", text.lower())]
    return " ".join(word for word in words if word)


def drop_exact_match(prediction: Answer, truth: Answer) -> float:
    """1.0 if both have the same number of spans, and the same ones once normalised, in any order; else 0.0."""
    predicted, true = _drop_spans(prediction), _drop_spans(truth)
    return float(len(predicted) == len(true) and set(predicted) == set(true))


def drop_f1(prediction: Answer, truth: Answer) -> float:
    """Mean F1 of the spans, each paired with at most one of the other answer, in the pairing that is best in all.

    A span is the set of its words, without repetition. A true span that has numbers needs one of them in the predicted
    span, or their F1 is 0. A span without partner counts as 0. Rounded to two decimals.

    Source: Dua et al., "DROP", NAACL 2019, section 5, and its published evaluation script, which does the rounding.
    """
    from scipy.optimize import linear_sum_assignment

    predicted, true = ([set(span.split()) for span in _drop_spans(answer)] for answer in (prediction, truth))
    agreement = np.array([[_bag_f1(p, t) for p in predicted] for t in true])
    partners = linear_sum_assignment(agreement, maximize=True)
    best = np.zeros(max(len(predicted), len(true)))
    best[: len(partners[0])] = agreement[partners]
    # numpy's rounding and the order of the operations are the script's: a tie must fall to the same side.
    return float(np.round(best.mean(), 2))


def _bag_f1(predicted: set[str], true: set[str]) -> float:
    numbers = {word for word in true if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & true)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(true) if true else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _drop_spans(answer: Answer) -> list[str]:
    return [drop_normalize(span) for span in ([answer] if isinstance(answer, str) else answer)]


def _drop_word(word: str) -> str:
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    if _is_number(word):
        return str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


_SCORERS: dict[str, Callable[..., float]] = {
    "f1": f1,
    "exact_match": exact_match,
    "drop_f1": drop_f1,
    "drop_exact_match": drop_exact_match,
}
CHOICE_METRICS = ("accuracy",)
TEXT_METRICS = tuple(_SCORERS)
