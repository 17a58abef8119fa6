"""Scores of free text, computed by hand from the published rules of SQuAD v1.1 and DROP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forwardtune.errors import InputError
from forwardtune.tasks.metrics import TEXT_METRICS, drop_normalize, related, score


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_what_all_metrics_share(metric: str) -> None:
    """The same text is 1 and another 0; the best of the alternative answers counts in any order."""
    truths = ["Chicago", "the Broncos", "Denver Broncos won"]
    assert [score(metric, text, [truths[0]]) for text in ("Chicago", "Denver", "")] == [1, 0, 0]
    assert score(metric, "Broncos", truths) == score(metric, "Broncos", truths[::-1]) == 1
    assert score(metric, "Broncos", truths[:1]) == 0
    for no_list in ([], (), "Denver", ""):
        with pytest.raises(InputError, match=r"at least one answer.*as a list"):
            score(metric, "Denver", no_list)


def test_f1_and_exact_match_by_the_same_rules_are_kin() -> None:
    assert related("f1") == related("exact_match") == ("f1", "exact_match")
    assert related("drop_f1") == related("drop_exact_match") == ("drop_f1", "drop_exact_match")
    with pytest.raises(InputError, match=r"unknown metric 'drop_f'.*did you mean drop_f1"):
        score("drop_f", "a", ["a"])


PAIR = ("Vietnamese", "the Chinese")


@pytest.mark.parametrize(
    ("rules", "prediction", "truth", "f1", "exact"),
    [
        # Case, articles, punctuation and white space do not count. Curly quotes are no ASCII punctuation and stay.
        ("", "The Cat.", "cat", 1, 1),
        ("", " two\n words ", "two words", 1, 1),
        ("", "1,000", "1000", 1, 1),
        ("", "an “A”", "“a”", 1, 1),
        ("", "U.S.", "us", 1, 1),
        # Punctuation goes before articles are looked for, and "theatre" only begins like one.
        ("", "state-of-the-art", "stateoftheart", 1, 1),
        ("", "theatre", "atre", 0, 0),
        ("", "state-of-the-art", "state of art", 0, 0),
        # F1 is the harmonic mean of precision and recall, with repetition.
        ("", "a cat sat", "the cat ran", 1 / 2, 0),  # cat sat | cat ran: P 1/2, R 1/2
        ("", "Denver Broncos", "the Denver Broncos, Inc.", 4 / 5, 0),  # 2 shared; P 2/2, R 2/3
        ("", "to be or not to be", "to be", 1 / 2, 0),  # P 2/6, R 2/2
        ("", "to be to", "to to do", 2 / 3, 0),  # "to" is shared twice: P 2/3, R 2/3
        # Numbers are words: without its point, 3.0 is 30.
        ("", "3.0", "3", 0, 0),
        ("", "3.0", "30", 1, 1),
        # Texts of nothing but articles agree, as in SQuAD 2.
        ("", "A", "a.", 1, 1),
        ("", "the", "an", 1, 1),
        ("", "the", "cat", 0, 0),
        ("", "cat", "the", 0, 0),
        # DROP: equal numbers match however they are written.
        ("drop_", "3.0", "3", 1, 1),
        ("drop_", "1,725", "1725", 1, 1),
        ("drop_", "0.52", ".52", 1, 1),
        ("drop_", "$7.50", "7.5", 0, 0),  # no number for its sign, loses its point with it, and becomes 750
        ("drop_", "5", "-5", 1, 1),
        # F1 is 0 if the truth has numbers and none of them matches.
        ("drop_", "28 yards", "27 yards", 0, 0),
        ("drop_", "27 yards", "27 points", 0.5, 0),  # P 1/2, R 1/2
        ("drop_", "27 or 28 yards", "27 yards", 0.67, 0),  # one number is enough: P 2/4, R 2/2
        ("drop_", "Raiders 7", "Raiders", 0.67, 0),  # one in the prediction alone does no harm: P 1/2, R 1
        ("drop_", "yards", "27 yards", 0, 0),
        # Words count once a span, and F1 is rounded to two decimals.
        ("drop_", "to be to", "to to do", 0.5, 0),  # {to, be} and {to, do}: P 1/2, R 1/2
        ("drop_", "x y z", "x", 0.5, 0),  # P 1/3, R 1: 2 * (1/3) / (4/3)
        ("drop_", "w x y", "x y", 0.8, 0),  # P 2/3, R 1
        ("drop_", "v w x y z", "x", 0.33, 0),  # P 1/5, R 1
        ("drop_", "27-yard", "27 yard", 1, 1),
        ("drop_", "27-yard", "27", 0.67, 0),  # {27, yard} and {27}: P 1/2, R 1
        # Spans of one answer match in any order, but all are needed; one too many has no partner.
        ("drop_", ("Chinese", "Vietnamese"), PAIR, 1, 1),
        ("drop_", ("Chinese",), PAIR, 0.5, 0),
        ("drop_", "Chinese", PAIR, 0.5, 0),
        ("drop_", ("Chinese", "Thai", "Lao"), ("Chinese",), 0.33, 0),
        ("drop_", ("Chinese", "Chinese"), ("Chinese",), 0.5, 0),
        ("drop_", "3", ("3", "4"), 0.5, 0),  # no alternatives
        # They are paired in the way that is best in all: "x y" equals the first truth, but then "x" is left with "y",
        # (1 + 0) / 2. The other way round both are 2/3.
        ("drop_", ("x y", "x"), ("x y", "y"), 0.67, 0),
        # A pair whose numbers differ is none: "5 yards" shares a word with both, and a number with the second alone.
        ("drop_", ("5 yards",), ("6 yards", "5 yards"), 0.5, 0),
        ("drop_", ("5 yards",), ("6 yards", "5 points"), 0.25, 0),
    ],
)
def test_scores_by_hand(rules: str, prediction: Any, truth: Any, f1: float, exact: int) -> None:
    assert score(f"{rules}f1", prediction, [truth]) == pytest.approx(f1, abs=1e-12)
    assert score(f"{rules}exact_match", prediction, [truth]) == exact


@pytest.mark.parametrize(
    ("text", "expected", "why"),
    [
        ("1,725", "1725.0", "a comma makes it no number; without the comma it is one"),
        ("1725.00", "1725.0", "a number"),
        (".52", "0.52", "a number keeps its point"),
        ("-5", "5.0", "a hyphen parts words, so there are no negative numbers"),
        ("$5", "5.0", "punctuation goes first"),
        ("96%", "96.0", "punctuation goes first"),
        ("27-yard", "27.0 yard", "a hyphen parts words"),
        ("13-3", "13.0 3.0", "a hyphen parts words"),
        ("The  Giants!", "giants", "article, punctuation and white space"),
        ("  2010", "2010.0", "a date without day and month"),
        ("7 March\n1999", "7.0 march 1999", "a line break parts no words before numbers are looked for"),
        ("1e3", "1000.0", "a number as Python reads it"),
        ("the", "", "nothing is left"),
    ],
)
def test_drop_normalisation(text: str, expected: str, why: str) -> None:
    assert drop_normalize(text) == expected, why


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_answer_of_a_real_row_is_right(data_dir: Path) -> None:
    for row in read(data_dir / "drop" / "validation.jsonl"):
        spans = row["answers_spans"]["spans"]
        assert {score(metric, span, spans) for metric in TEXT_METRICS for span in spans} == {1}
    for row in read(data_dir / "squad" / "validation.jsonl"):
        truths = row["answers"]["text"]
        assert {score(m, f"The {truth}.", truths) for m in ("f1", "exact_match") for truth in truths} == {1}


def test_several_numbers_in_a_drop_row_are_alternatives_for_they_contradict_one_another(data_dir: Path) -> None:
    """A question for one number has no two of them for an answer: they are several annotators'."""
    several = [
        spans
        for split in ("train", "validation")
        for row in read(data_dir / "drop" / f"{split}.jsonl")
        if row["question"].startswith("How many") and " and " not in row["question"]
        if set(row["answers_spans"]["types"]) == {"number"} and len(spans := row["answers_spans"]["spans"]) > 1
    ]
    assert len(several) > 5
    assert all(score("drop_exact_match", spans[0], spans[1:]) == 0 for spans in several)
