"""What is measured on held-out examples. Free text is scored as SQuAD does it."""

from __future__ import annotations

import re
import string
from collections import Counter

CHOICE_METRICS = ("accuracy",)
TEXT_METRICS = ("f1", "exact_match")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD v1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both are the same once normalised, else 0.0."""
    return float(normalize(prediction) == normalize(truth))


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, counted with repetition."""
    predicted, true = normalize(prediction).split(), normalize(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))
