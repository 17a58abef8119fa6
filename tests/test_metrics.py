"""Scores of free text, computed by hand from the published rules of SQuAD v1.1 and DROP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forwardtune.errors import InputError
from forwardtune.tasks.metrics import TEXT_METRICS, drop_normalize, related, score


def scores(metric: str, *pairs: tuple[Any, Any]) -> list[float]:
    """The score of every (prediction, one true answer)."""
    return [score(metric, prediction, [truth]) for prediction, truth in pairs]


# --- what all metrics share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_the_same_text_is_1_and_another_0(metric: str) -> None:
    assert scores(metric, ("Denver Broncos", "Denver Broncos"), ("Denver", "Chicago"), ("", "Denver")) == [1, 0, 0]


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_best_of_the_alternative_answers_counts_in_any_order(metric: str) -> None:
    truths = ["Chicago", "the Broncos", "Denver Broncos won"]
    assert score(metric, "Broncos", truths) == score(metric, "Broncos", truths[::-1]) == 1
    assert score(metric, "Broncos", truths[:1]) == 0


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("truths", [[], (), "Denver", ""])
def test_answers_that_are_no_list_or_none_at_all_are_refused(metric: str, truths: Any) -> None:
    with pytest.raises(InputError, match=r"at least one answer.*as a list"):
        score(metric, "Denver", truths)


def test_f1_and_exact_match_by_the_same_rules_are_kin() -> None:
    assert related("f1") == related("exact_match") == ("f1", "exact_match")
    assert related("drop_f1") == related("drop_exact_match") == ("drop_f1", "drop_exact_match")


def test_unknown_metric_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown metric 'drop_f'.*did you mean drop_f1"):
        score("drop_f", "a", ["a"])


# --- SQuAD -------------------------------------------------------------------------------------------------------


def test_squad_case_articles_punctuation_and_white_space_do_not_count() -> None:
    pairs = [("The Cat.", "cat"), (" two\n words ", "two words"), ("1,000", "1000"), ("an “A”", "“a”"), ("U.S.", "us")]
    # The curly quotes of the fourth are no ASCII punctuation: what they enclose is an article and goes, they stay.
    assert scores("exact_match", *pairs) == scores("f1", *pairs) == [1] * 5


def test_squad_article_inside_a_word_or_joined_by_removed_punctuation_stays() -> None:
    # "state-of-the-art" becomes one word before articles are looked for, and "theatre" only begins like one.
    pairs = [("state-of-the-art", "stateoftheart"), ("theatre", "atre"), ("state-of-the-art", "state of art")]
    assert scores("exact_match", *pairs) == [1, 0, 0]


def test_squad_f1_is_harmonic_mean_of_precision_and_recall_with_repetition() -> None:
    pairs = [
        ("a cat sat", "the cat ran"),  # cat sat | cat ran: P 1/2, R 1/2
        ("Denver Broncos", "the Denver Broncos, Inc."),  # 2 shared; P 2/2, R 2/3
        ("to be or not to be", "to be"),  # P 2/6, R 2/2
        ("to be to", "to to do"),  # "to" is shared twice: P 2/3, R 2/3
    ]
    assert scores("f1", *pairs) == pytest.approx([1 / 2, 4 / 5, 1 / 2, 2 / 3], abs=1e-12)
    assert scores("exact_match", *pairs) == [0, 0, 0, 0]


def test_squad_numbers_are_words_so_equal_numbers_written_otherwise_differ() -> None:
    # Without its point, 3.0 is 30.
    assert scores("exact_match", ("3.0", "3"), ("3.0", "30")) == [0, 1]


def test_squad_texts_of_nothing_but_articles_agree_as_in_squad_2() -> None:
    pairs = [("A", "a."), ("the", "an"), ("the", "cat"), ("cat", "the")]
    assert scores("f1", *pairs) == scores("exact_match", *pairs) == [1, 1, 0, 0]


# --- DROP --------------------------------------------------------------------------------------------------------


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


def test_drop_equal_numbers_match_however_they_are_written() -> None:
    pairs = [("3.0", "3"), ("1,725", "1725"), ("0.52", ".52"), ("$7.50", "7.5"), ("5", "-5")]
    # "$7.50" is no number for its sign, loses its point with it, and becomes 750.
    assert scores("drop_exact_match", *pairs) == scores("drop_f1", *pairs) == [1, 1, 1, 0, 1]


def test_drop_f1_is_0_if_the_truth_has_numbers_and_none_of_them_matches() -> None:
    pairs = [
        ("28 yards", "27 yards"),  # half of the words agree, but not the number
        ("27 yards", "27 points"),  # the number agrees: P 1/2, R 1/2
        ("27 or 28 yards", "27 yards"),  # one number is enough: P 2/4, R 2/2, so 2/3
        ("Raiders 7", "Raiders"),  # a number in the prediction alone does no harm: P 1/2, R 1
        ("yards", "27 yards"),
    ]
    assert scores("drop_f1", *pairs) == [0, 0.5, 0.67, 0.67, 0]


def test_drop_words_count_once_a_span_and_f1_is_rounded_to_two_decimals() -> None:
    # {to, be} and {to, do}: P 1/2, R 1/2; then {x, y, z} and {x}: P 1/3, R 1, 2 * (1/3) / (4/3) = 1/2;
    # then {w, x, y} and {x, y}: P 2/3, R 1, so 0.8; {v, w, x, y, z} and {x}: P 1/5, R 1, so 1/3.
    pairs = [("to be to", "to to do"), ("x y z", "x"), ("w x y", "x y"), ("v w x y z", "x")]
    assert scores("drop_f1", *pairs) == [0.5, 0.5, 0.8, 0.33]


def test_drop_hyphenated_words_are_bags_of_their_parts() -> None:
    assert scores("drop_exact_match", ("27-yard", "27 yard"), ("27-yard", "27")) == [1, 0]
    assert scores("drop_f1", ("27-yard", "27")) == [0.67]  # {27, yard} and {27}: P 1/2, R 1


def test_drop_spans_of_one_answer_match_in_any_order_but_all_are_needed() -> None:
    truth = ("Vietnamese", "the Chinese")
    pairs = [(("Chinese", "Vietnamese"), truth), (("Chinese",), truth), ("Chinese", truth)]
    assert scores("drop_exact_match", *pairs) == [1, 0, 0]
    assert scores("drop_f1", *pairs) == [1, 0.5, 0.5]  # one span of two


def test_drop_spans_too_many_are_spans_without_partner() -> None:
    assert scores("drop_f1", (("Chinese", "Thai", "Lao"), ("Chinese",))) == [0.33]
    assert scores("drop_exact_match", (("Chinese", "Chinese"), ("Chinese",))) == [0]


def test_drop_spans_are_paired_in_the_way_that_is_best_in_all() -> None:
    # "x y" equals the first truth, but then "x" is left with "y": (1 + 0) / 2. The other way round both are 2/3.
    assert scores("drop_f1", (("x y", "x"), ("x y", "y"))) == [0.67]


def test_drop_a_pair_whose_numbers_differ_is_no_pair() -> None:
    # "5 yards" shares a word with both, and a number with the second alone: (0 + 1) / 2 and (1/2 + 0) / 2.
    assert scores("drop_f1", (("5 yards",), ("6 yards", "5 yards")), (("5 yards",), ("6 yards", "5 points"))) == [
        0.5,
        0.25,
    ]


def test_drop_several_spans_of_one_answer_are_not_alternatives() -> None:
    assert score("drop_f1", "3", ["3", "4"]) == 1
    assert score("drop_f1", "3", [("3", "4")]) == 0.5


# --- real rows ---------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_span_of_a_drop_row_is_a_right_answer(data_dir: Path) -> None:
    for row in rows(data_dir / "drop" / "validation.jsonl"):
        spans = row["answers_spans"]["spans"]
        for span in spans:
            assert [score(metric, span, spans) for metric in ("drop_f1", "drop_exact_match", "f1", "exact_match")] == [
                1
            ] * 4


def test_several_numbers_in_a_drop_row_are_alternatives_for_they_contradict_one_another(data_dir: Path) -> None:
    """A question for one number has no two of them for an answer: they are several annotators'."""
    several = [
        spans
        for split in ("train", "validation")
        for row in rows(data_dir / "drop" / f"{split}.jsonl")
        if row["question"].startswith("How many") and " and " not in row["question"]
        if set(row["answers_spans"]["types"]) == {"number"} and len(spans := row["answers_spans"]["spans"]) > 1
    ]
    assert len(several) > 5
    assert all(score("drop_exact_match", spans[0], spans[1:]) == 0 for spans in several)


def test_every_answer_of_a_squad_row_is_right(data_dir: Path) -> None:
    for row in rows(data_dir / "squad" / "validation.jsonl"):
        truths = row["answers"]["text"]
        for truth in truths:
            assert score("f1", f"The {truth}.", truths) == score("exact_match", f"The {truth}.", truths) == 1
