"""Task files, data files and metrics: what a task means, and one clear message for every way to be wrong."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forwardtune.errors import InputError
from forwardtune.tasks import BadRowsError, Task, doubts, get_task, load_split, load_splits
from forwardtune.tasks.reader import read_task
from forwardtune.tasks.rows import read_rows
from forwardtune.tasks.template import columns_of

ROWS = [{"text": f"review {i}, with a comma", "label": i % 2} for i in range(20)]


def make_task(prompt: str = "{text} It was", **changes: Any) -> Task:
    answers = {"0": "terrible", "1": "great"}
    return Task(
        **{"name": "t", "prompt": prompt, "label": "label", "answers": answers, "metric": "accuracy", **changes}
    )


def write_task(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **changes: Any) -> Any:
    return load_split(make_task(files={"train": path}, **changes), "train")


# --- the tasks of the package ------------------------------------------------------------------------------------


def test_embedded_reviews_are_balanced_plain_and_unique() -> None:
    task = get_task("reviews")
    rows = {
        split: [json.loads(line) for line in task.files[split].read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 400, "test": 200}
    for found in rows.values():
        cells = Counter((row["label"], row["kind"]) for row in found)
        assert cells == dict.fromkeys(
            [(label, kind) for label in ("negative", "positive") for kind in ("film", "product")], len(found) // 4
        )
    texts = [row["text"] for found in rows.values() for row in found]
    for text in texts:
        assert text.isascii()
        assert text == text.strip()
        assert 4 <= len(text.split()) <= 40, text
    normalised = Counter(" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in texts)
    assert normalised.most_common(1)[0][1] == 1, normalised.most_common(1)


# --- templates ---------------------------------------------------------------------------------------------------


FREE: dict[str, Any] = {"answers": None, "label": "text", "metric": "f1"}
FILTERED = "{a|upper_first}? {b|lower_first} {c|without_stop} {d|without_stop} {c|without_stop|lower_first}"


@pytest.mark.parametrize(
    ("prompt", "changes", "row", "expected"),
    [
        # A template is plain substitution of stripped values.
        ("{text} It was", {}, {"text": "  fine \n"}, {"prompt": "fine It was"}),
        ("{text} It was", {}, {"text": "a {label} of {{braces}} {"}, {"prompt": "a {label} of {{braces}} { It was"}),
        ("{text} a", {}, {"text": "%s %(text)s {0} \\1 \\g<1>"}, {"prompt": "%s %(text)s {0} \\1 \\g<1> a"}),
        ("{{text}} {text}", {}, {"text": "fine"}, {"prompt": "{text} fine"}),
        ("{text} or {text}?", {}, {"text": "a"}, {"prompt": "a or a?"}),
        ("{text} }} {{", {}, {"text": "a"}, {"prompt": "a } {"}),
        ("{text}", {}, {"text": 7}, {"prompt": "7"}),
        ("{text}", {}, {"text": False}, {"prompt": "False"}),
        ("{text}", {}, {"text": 0}, {"prompt": "0"}),
        # Filters change one letter or the final stop; replacements their column alone, and may hold placeholders.
        (
            FILTERED,
            {},
            {"a": "was it McDonald's", "b": "It was Ann", "c": "He left .", "d": "Inc. won.."},
            {"prompt": "Was it McDonald's? it was Ann He left Inc. won. he left"},
        ),
        ("{a} {b}", {"replace": {"a": {"X": "<{b}>", "Y": "-"}}}, {"a": "X Y Z", "b": "X"}, {"prompt": "<X> - Z X"}),
        # Answers are joined by one space unless the prompt ends in white space, and may be columns.
        ("{text} It was", {}, {"text": "a"}, {"options": (" terrible", " great")}),
        ("{text}\n", {}, {"text": "a"}, {"options": ("terrible", "great")}),
        ("{text} ", {}, {"text": "a"}, {"options": ("terrible", "great")}),
        ("{text} It was", FREE, {"text": "a"}, {"target": " a", "options": ()}),
        ("{text}\n", FREE, {"text": "a"}, {"target": "a", "options": ()}),
        (
            "{text} because ",
            {"answers": {"0": "{first|lower_first}", "1": "it {second}"}},
            {"text": "A", "first": "It rained.", "second": "shone"},
            {"options": ("it rained.", "it shone"), "right": (1,), "targets": (), "context": (0, 1)},
        ),
        # For masked models they are bare words.
        ("{text} It was [MASK].", {}, {"text": "a"}, {"prompt": "a It was [MASK].", "options": ("terrible", "great")}),
        # The prompt without content is its own last words, or what the task says.
        ("{text} It was", {}, {"text": "a"}, {"calibration": "It was"}),
        ("{text} It was", {"calibration": "{kind} was"}, {"text": "a", "kind": "film"}, {"calibration": "film was"}),
        ("{text} It was", {"calibration": ""}, {"text": "a"}, {"calibration": ""}),
        ("{text} {{x}} {text}\n {{y}}", {}, {"text": "a"}, {"calibration": "{y}"}),
        # The context is the first column, unless the task names another.
        ("Say {a}, {b}, {a}.", {}, {"a": "premise", "b": "other one"}, {"context": (4, 11)}),
        ("Say {a}, {b}, {a}.", {"context": "b"}, {"a": "premise", "b": "other one"}, {"context": (13, 22)}),
    ],
)
def test_what_a_row_becomes(prompt: str, changes: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    task, row = make_task(prompt, **changes), {"label": 1, **row}
    example = task.example(row, "row 1")
    assert {name: getattr(example, name) for name in expected} == expected
    assert example.row == row
    assert task.fixed_answers == ("first" not in row and "answers" not in changes)


@pytest.mark.parametrize(
    "placeholder", ["text.__class__", "text!r", "text:>30", "text[0]", "0", " text", ""], ids=lambda name: f"[{name}]"
)
def test_format_language_is_no_language_but_an_unknown_column(placeholder: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(placeholder))):
        make_task(f"{{text}} {{{placeholder}}}").example({"text": "a", "label": 1}, "row 1")


@pytest.mark.parametrize(
    ("prompt", "hint"), [("{text} {a: 1}", True), ("{text} { x }", True), ("{text} {a b-c}", False)]
)
def test_braces_that_are_hardly_a_column_are_told_from_a_missing_one(prompt: str, hint: bool) -> None:
    message = _failure(make_task(prompt).example, {"text": "a", "label": 1}, "row 1")
    assert "row 1 has no column" in message
    assert ("are written {{ and }}" in message) == hint


@pytest.mark.parametrize(
    ("keys", "label", "expected"),
    [
        ("0: bad, 1: good", 1, 1),
        ("0: bad, 1: good", "1", 1),
        ("0: bad, 1: good", " 0 ", 0),
        ("false: bad, true: good", True, 1),
        ("false: bad, true: good", False, 0),
        ("neg: bad, pos: good", "pos", 1),
        ("-1: bad, 1: good", -1, 0),
        ("0: bad, 1: good", 1.0, 1),  # as a data frame with a gap writes whole numbers
        ("0: bad, 1: good", "0.0", 0),
        ("0.0: bad, 1.0: good", 1, 1),
        ("0: bad, 1: good", True, 1),
        ("0: bad, 1: good", "false", 0),
        ("false: bad, true: good", "TRUE", 1),
        ("-1: bad, 1: good", "-1.0", 0),
        ("1: bad, '1.0': good", 1, 0),
        ("1: bad, '1.0': good", "1.0", 1),
        ("1e3: bad, 1: good", "1000", 0),
    ],
)
def test_labels_may_be_numbers_texts_or_booleans(tmp_path: Path, keys: str, label: Any, expected: int) -> None:
    task = read_task(write_task(tmp_path, f"prompt: '{{text}}'\nanswers: {{{keys}}}\ntrain: a.csv\n"))
    assert task.example({"text": "a", "label": label}, "").label == expected


def test_label_that_is_no_spelling_of_an_answer_stays_what_it_is() -> None:
    for label in (0.5, "one", "nan", float("inf"), "", "1 0"):
        assert make_task().label_of(label) == str(label)
    assert make_task(answers={"1": "a", "01": "b", "0": "c"}).label_of(1.0) == "1.0"  # which of the two?


def test_labels_of_all_spellings_are_drawn_by_class_and_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": label} for i, label in enumerate([0, 1.0, "0.0", True, -1.0, "-1", False, "1"])]
    splits = load_splits(split_task(tmp_path, rows, unlabelled="-1"), per_class=3, dev_examples=0)
    assert list(splits["train"].numbers) == [0, 1, 2, 3, 6, 7]
    assert [example.label for example in splits["train"].examples] == [0, 1, 0, 1, 0, 1]


def _failure(do: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message with which it is refused, empty if it is not."""
    try:
        do(*arguments, **options)
    except InputError as error:
        return str(error)
    return ""


def test_column_may_be_inside_another_one() -> None:
    row = {"answers": {"text": [" a ", "b", "a"], "start": [1]}, "a.b": "dotted", "q": "why"}
    task = make_task("{a.b} {q}", label="answers.text", answers=None, metric="f1")
    assert task.example(row, "").prompt == "dotted why"
    assert task.example(row, "").targets == (" a", " b")
    with pytest.raises(InputError, match=r"row 1 has no column 'answers\.txt'"):
        make_task("{q}", label="answers.txt", answers=None, metric="f1").example(row, "row 1")
    with pytest.raises(InputError, match=r"'answers\.text' is empty"):
        task.example({**row, "answers": {"text": []}}, "row 1")


def test_each_entry_of_a_list_may_be_an_option() -> None:
    task = make_task(
        "{text}\n- ", answers=None, label="right", options=("parts", "{query}"), replace={"query": {"@": "{option}"}}
    )
    row = {"text": "T", "parts": ["A", " B ", "@C"], "query": "x @ y @", "right": ["B", "@C", "unseen"]}
    example = task.example(row, "")
    assert example.options == ("x A y A", "x B y B", "x @C y @C")
    assert (example.right, example.label) == ((1, 2), 1)
    with pytest.raises(InputError, match=r"row 1: none of .*among the 3 entries of 'parts'"):
        task.example({**row, "right": ["D"]}, "row 1")
    with pytest.raises(InputError, match="row 1: column 'parts' must hold a list"):
        task.example({**row, "parts": "A"}, "row 1")


# --- task files --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "'{text} It was'", "answers": "{0: terrible, 1: great}", "train": "train.csv", "test": "test.csv"}


def task_text(**changes: str | None) -> str:
    lines = {**GOOD, **changes}
    return "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)


def pairs_text(**changes: str | None) -> str:
    return task_text(**{"answers": None, "preference": "{chosen: good, rejected: bad}", **changes})


def test_task_file_defaults(tmp_path: Path) -> None:
    task = get_task(str(write_task(tmp_path, task_text())))
    assert (task.name, task.label, task.metric, task.stop) == ("mine", "label", "accuracy", "\n")
    assert task.answers == {"0": "terrible", "1": "great"}
    assert columns_of(task.prompt) == ["text"]
    assert (task.loss, task.kind, task.masked) == ("cross_entropy", "causal", None)
    assert task.fixed_answers
    assert not task.free_text
    assert (task.context, task.calibration, task.unlabelled, task.options, task.replace) == (None, None, None, None, {})
    assert (task.dev_examples, task.max_new_tokens, task.hub) == (500, 50, None)
    assert task.files == {"train": tmp_path / "train.csv", "test": tmp_path / "test.csv"}
    free = read_task(write_task(tmp_path, task_text(answers=None, target="reply")))
    assert (free.answers, free.label, free.metric, free.loss) == (None, "reply", "f1", "likelihood")
    assert free.free_text
    assert not free.fixed_answers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: [unclosed", "not valid YAML"),
        (
            task_text(prompt="A: {text}"),
            "YAML: line 1, 'prompt: A: {text}': mapping values .* Put text in quotes that holds",
        ),
        (task_text(prompt="{text} It was"), "line 1, 'prompt: {text} It was': expected .* in quotes"),
        (task_text(prompt="@{text}"), "line 1, 'prompt: @{text}': found character '@' .* in quotes"),
        (task_text(prompt="{{text}} It was"), "not valid YAML: .* in quotes"),
        (task_text() + "prompt: '{label}'\n", "line 5: 'prompt' is there twice: rename or remove one"),
        (task_text(answers="{0: great, 1: bad, 0: fine}"), "'0' is there twice"),
        (
            task_text(prompt="'{text} {\"a\": 0}'"),
            r"prompt has '{\"a\": 0}', which names no column. .* are written {{ and }}",
        ),
        (task_text(prompt='"{text} {\\n}"'), "which names no column. Braces"),
        ("prompt: !!python/object/apply:os.getcwd []\n", "not valid YAML.*python/object"),
        ("just words", "must hold keys"),
        ("", "must hold keys"),
        (task_text(promt="'{text}'"), "unknown key 'promt'.*did you mean prompt"),
        (task_text(prompt=None), "prompt must be text"),
        (task_text(prompt="no column"), r"at least one \{column\}"),
        (task_text(prompt="'{{text}}'"), r"at least one \{column\}"),
        (task_text(target="reply"), "give one of answers .*, options .*, target .* and preference, not several"),
        (task_text(answers=None, label="label"), "label needs answers or options beside it"),
        (task_text(answers="{0: great}"), "at least two"),
        (task_text(answers="{1: great, '1': terrible}"), "at least two|twice|same label"),
        (task_text(answers="[a, b]"), "answers must map"),
        (task_text(answers="{0: '', 1: great}"), "the answer for 0 is empty: give the text"),
        (task_text(answers="{0: no, 1: great}"), "not text: put it in quotes"),
        (task_text(answers="{0: great, 1: ' great '}"), "same text"),
        (task_text(metric="f1"), "'f1' does not suit.*accuracy"),
        (task_text(answers=None, target="reply", metric="accuracy"), "does not suit.*f1 or exact_match"),
        (task_text(metric="acuracy"), "does not suit"),
        (task_text(train=None, test=None), "train: and test:.*hub:"),
        (task_text(hub="{path: a/b, train: train, test: test}"), "either files.*or.*hub"),
        (task_text(train=None, test=None, hub="{path: a/b}"), "hub must be"),
        (task_text(train=None, test=None, hub="a/b"), "hub must be"),
        (task_text(answers=None, target="reply", max_new_tokens="many"), "max_new_tokens"),
        (task_text(answers=None, target="reply", max_new_tokens="0"), "max_new_tokens"),
        (task_text(label="kind", target="reply", answers=None), "not several"),
        (task_text(options="{each: parts, text: '{option}'}"), "not several"),
        (task_text(answers=None, options="{each: parts}"), "options must be.*each: COLUMN, text: TEMPLATE"),
        (task_text(answers=None, options="parts"), "options must be"),
        (task_text(answers=None, options="{each: parts, text: 3}"), "options must be text.*quotes"),
        (task_text(answers=None, options="{each: parts, text: '{option}'}", metric="f1"), "does not suit.*accuracy"),
        (task_text(loss="likelyhood"), "'likelyhood' does not suit.*cross_entropy or likelihood"),
        (task_text(answers=None, target="reply", loss="cross_entropy"), "does not suit.*choose likelihood"),
        (task_text(splits="lm-bff"), "splits 'lm-bff' does not suit it: choose forwardtune or mezo"),
        (task_text(prompt="'{text|uper_first}'"), "unknown filter 'uper_first'.*did you mean upper_first"),
        (task_text(prompt="'{text} {}'"), "without the name of a column"),
        (task_text(answers="{0: '{a|b}', 1: good}"), "unknown filter 'b'"),
        (task_text(calibration="'{text|nothing}'"), "calibration has the unknown filter"),
        (task_text(calibration="3"), "calibration must be text.*quotes"),
        (task_text(context="txet"), "'txet' is not a column of the prompt; did you mean text"),
        (task_text(replace="text"), "replace must be"),
        (task_text(replace="{text: new}"), "replace must be"),
        (task_text(replace="{text: {a: '{b|nothing}'}}"), "unknown filter 'nothing'"),
        (task_text(replace="{text: {a: '{text}'}}"), "replace"),
        (task_text(dev_examples="-1"), "dev_examples must be a whole number of at least 0"),
        (task_text(dev_examples="true"), "dev_examples"),
        (task_text(masked="'{text} [MASK]'"), r"masked must hold a prompt with \[MASK\]"),
        (task_text(masked="{prompt: '{text} It was'}"), r"masked must hold a prompt with \[MASK\]"),
        (task_text(masked="{prompt: '{text} [MASK]', metric: accuracy}"), "masked: unknown key 'metric'"),
        (task_text(prompt="'{text} [MASK]'", answers=None, target="reply"), r"\[MASK\] needs answers"),
        (task_text(train=None, test=None, hub="{path: a/b, train: t, test: u, split: v}"), "hub: unknown key 'split'"),
        (pairs_text(preference="{chosen: good}"), "preference must be {chosen: COLUMN, rejected: COLUMN}"),
        (pairs_text(preference="good"), "preference must be {chosen: COLUMN, rejected: COLUMN}"),
        (pairs_text(beta="0"), "beta must be a positive number, got 0: 0.1 is usual"),
        (pairs_text(beta=".nan"), "beta must be a positive number, got nan"),
        (pairs_text(beta="true"), "beta must be a positive number, got True"),
        (pairs_text(beta="'0.1'"), "beta must be a positive number, got '0.1'"),
        (pairs_text(label="good"), "give one of answers .* and preference, not several"),
        (pairs_text(target="good"), "not several"),
        (pairs_text(answers="{0: a, 1: b}"), "not several"),
        (pairs_text(metric="f1"), "metric 'f1' does not suit it: choose accuracy"),
        (pairs_text(loss="likelihood"), "loss 'likelihood' does not suit it: choose preference"),
        (pairs_text(prompt="'{text} [MASK]'"), r"a prompt with \[MASK\] needs answers"),
    ],
    ids=lambda text: text.splitlines()[-1][:40] if "\n" in text else None,
)
def test_what_is_wrong_in_a_task_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = write_task(tmp_path, text)
    with pytest.raises(InputError, match=words) as caught:
        get_task(str(path))
    assert str(path) in str(caught.value)


def test_task_may_be_worded_for_both_kinds_of_models(tmp_path: Path) -> None:
    wording = "{prompt: '{text} It was [MASK].', answers: {0: bad, 1: good}}"
    more = {"context": "text", "calibration": "It was", "dev_examples": "7", "unlabelled": "-1"}
    task = read_task(write_task(tmp_path, task_text(masked=wording, **more)))
    assert task.worded_for("causal") is task
    masked = task.worded_for("masked")
    assert (task.kind, masked.kind, task.wordings) == ("causal", "masked", [task, masked])
    assert (masked.prompt, masked.answers) == ("{text} It was [MASK].", {"0": "bad", "1": "good"})
    assert (masked.name, masked.files, masked.dev_examples, masked.unlabelled) == ("mine", task.files, 7, "-1")
    assert (task.answers, task.context, task.calibration) == ({"0": "terrible", "1": "great"}, "text", "It was")
    assert (masked.context, masked.calibration) == (None, None)


def test_task_worded_for_one_kind_of_models_alone_refuses_the_other(tmp_path: Path) -> None:
    causal = read_task(write_task(tmp_path, task_text()))
    with pytest.raises(InputError, match=r"task mine has a prompt for causal models alone.*\[MASK\] in its prompt"):
        causal.worded_for("masked")
    for text in (task_text(prompt="'{text} [MASK]'"), task_text(prompt=None, masked="{prompt: '{text} [MASK]'}")):
        masked = read_task(write_task(tmp_path, text))
        assert masked.worded_for("masked") is masked
        with pytest.raises(InputError, match=r"task mine has a prompt for masked models alone.*roberta-large"):
            masked.worded_for("causal")


def test_task_file_with_a_data_set_of_the_hub(tmp_path: Path) -> None:
    hub = "{path: a/b, name: c, train: train, dev: held_out, test: validation}"
    task = read_task(write_task(tmp_path, task_text(train=None, test=None, hub=hub)))
    assert task.hub == {"path": "a/b", "name": "c", "train": "train", "dev": "held_out", "test": "validation"}
    assert task.files == {}


def test_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown task 'reviws'.*reviews, .*sst2.*did you mean reviews"):
        get_task("reviws")
    with pytest.raises(InputError, match="no such task file"):
        get_task(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yml").write_bytes("prompt: '{text} était'".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        get_task(str(tmp_path / "latin.yml"))


# --- data files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"txet": "a", "kind": "b", "label": 1}, r"no column 'text'.*\(it has txet, kind, label\); did you mean txet"),
        ({"text": "", "label": 1}, "'text' is empty"),
        ({"text": " \n", "label": 1}, "'text' is empty"),
        ({"text": None, "label": 1}, "'text' is empty"),
        ({"text": math.nan, "label": 1}, "'text' is empty"),
        ({"text": "a"}, "no column 'label'"),
        ({"text": "a", "label": 2}, r"label '2' is not among the answers.*0, 1"),
        ({"text": "a", "label": None}, "'label' is empty"),
    ],
)
def test_row_that_the_task_cannot_use(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(InputError, match=words) as caught:
        load(path)
    assert f"{path}, example 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ("a.jsonl", b"", "holds no example"),
        ("a.jsonl", b"\n \n", "holds no example"),
        ("a.jsonl", b'{"text": "\xe9t\xe9", "label": 1}\n', "not UTF-8.*iconv"),
        ("a.csv", b"", "holds no example"),
        ("a.csv", b"text,label\n", "holds no example"),
        ("a.csv", b"text,label\na,1\nb, with a comma,0\n", "line 3 has not as many cells.*quote"),
        ("a.csv", b"text,label\na\n", "line 2 has not as many cells"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("a.txt", b"a,1\n", r"JSON Lines \(\.jsonl\) or CSV"),
        ("a.csv", b"text,label,text\na,1,b\n", "'text' is the name of two columns: rename or remove one"),
        ("a.csv", b"text, label,label\na,1,0\n", "'label' is the name of two columns"),
        ("a.tsv", b"text\tlabel\ttext\na\t1\tb\n", "'text' is the name of two columns"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "text": "b"}\n', "line 2: 'text' is the name of"),
        ("a.json", b'[{"text": "a", "label": 1, "label": 0}]', "'label' is the name of two columns"),
        ("a.json", b'[{"text": "a", "label": 1}, 3]', "entry 2 is not a JSON object"),
        ("a.json", b'[{"text": "a"},\n{]', "begins like a JSON array and is none .*line 2.*one array of objects"),
        ("a.json", b'{\n "text": "a"\n}', "line 1 is not JSON .*one object a line .*or one array"),
        ("a.json", b"[]", "holds no example"),
        ("a.tsv", b"text\tlabel\na\t1\nb\n", r"line 3 has not as many cells .*\(1, not 2\): quote .* that hold tabs"),
        ("a.csv", b"text;label\na;1\nb;c;1\n", "line 3 has not as many cells.*hold semicolons"),
    ],
)
def test_malformed_data_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for loaded in (load, lambda path: load_splits(make_task(files={"train": path}), only=["train"])):
        with pytest.raises(InputError, match=words) as caught:
            loaded(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\nfine,1\n"a, b",0\n'),
        ("a.csv", ' text , label\nfine,1\n"a, b",0\n'),
        ("a.csv", "\ntext;label\n\nfine;1\na, b;0\n"),
        ("a.csv", '"text, or so";label;text\nx;1;fine\ny;0;"a, b"\n'),
        ("a.csv", "text\tlabel\nfine\t1\na, b\t0\n"),
        ("a.csv", "text|label\nfine|1\na, b|0\n"),
        ("a.csv", ',text,label,\n0,fine,1,\n1,"a, b",0,\n'),  # names may be missing, as with an index
        ("a.tsv", "text\tlabel\nfine\t1\na, b\t0\n"),
        ("a.tsv", 'text\tlabel\n"fine"\t1\n"a, b"\t0\n'),
        ("a.tsv", 'text,label\nfine,1\n"a, b",0\n'),
        ("a.TSV", "text\tlabel\r\nfine\t1\r\na, b\t0"),
        ("a.json", '[{"text": "fine", "label": 1}, {"text": "a, b", "label": 0}]'),
        ("a.json", '\n [\n{"text": "fine",\n"label": 1},\n{"text": "a, b", "label": 0}\n]\n'),
        ("a.jsonl", '[{"text": "fine", "label": 1}, {"text": "a, b", "label": 0}]'),
        ("a.json", '{"text": "fine", "label": 1}\n{"text": "a, b", "label": 0}\n'),
    ],
)
def test_what_data_files_may_look_like(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    examples = load(path).examples
    assert [(example.prompt, example.label) for example in examples] == [("fine It was", 1), ("a, b It was", 0)]


def test_quotation_marks_in_tab_separated_lines(tmp_path: Path) -> None:
    """A lone one would swallow the lines up to the next, and two rows would be one; where they enclose a tab, they do."""
    lines = ['"To be\t1', 'or not"\t0', '"a ""quoted"" word"\t1', '"one" and "two"\t0', '"\t1', '""\t0', "\t"]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]), encoding="utf-8")
    rows = read_rows(tmp_path / "a.tsv")
    assert [row["text"] for row in rows] == ['"To be', 'or not"', 'a "quoted" word', '"one" and "two"', '"', "", ""]
    (tmp_path / "b.tsv").write_text('text\tlabel\n"a\tb"\t1\n"c\nd"\t0\n', encoding="utf-8")
    assert read_rows(tmp_path / "b.tsv") == [{"text": "a\tb", "label": "1"}, {"text": "c\nd", "label": "0"}]


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.csv: there is no such data file"):
        load(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder.csv cannot be read"):
        load(tmp_path / "folder.csv")
    with pytest.raises(InputError, match=r"no test file.*'test: FILE'"):
        load_split(make_task(files={"train": tmp_path / "a.csv"}), "test")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_csv_and_json_lines_give_the_same_examples(tmp_path: Path, bom: bytes, newline: bytes) -> None:
    texts = ["plain", 'with "quotes", and a comma', "été ✓", "long " * 50_000 + "."]
    lines = [json.dumps({"text": text, "label": 1}, ensure_ascii=False).encode() for text in texts]
    (tmp_path / "a.jsonl").write_bytes(bom + newline.join(lines))
    cells = ['"' + text.replace('"', '""') + '",1' for text in texts]
    (tmp_path / "a.csv").write_bytes(bom + newline.join(cell.encode() for cell in ["text,label", *cells]))
    examples = load(tmp_path / "a.jsonl").examples
    assert [example.prompt for example in examples] == [f"{text} It was" for text in texts]
    # CSV knows texts alone, so only the rows' own values may differ.
    assert [replace(e, row={}) for e in load(tmp_path / "a.csv").examples] == [replace(e, row={}) for e in examples]


@pytest.mark.parametrize(
    "place",
    [*(f"t/{file}" for file in ("validation.jsonl", "validation.csv", "test.jsonl", "test.tsv")),
     *("validation.csv", "test.jsonl", "test.json")],
)  # fmt: skip
def test_data_dir_is_searched_by_task_and_by_the_data_sets_own_split_names(tmp_path: Path, place: str) -> None:
    task = make_task(hub={"path": "a/b", "train": "train", "test": "validation"})
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label\na,1\n" if path.suffix in (".csv", ".tsv") else '{"text": "a", "label": 1}\n')
    loaded = load_split(task, "test", data_dir=tmp_path)
    assert (loaded.source, loaded.available) == (str(path), 1)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "t" / "train.jsonl"))):
        load_split(task, "train", data_dir=tmp_path)


def test_data_dir_prefers_the_tasks_own_folder(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "t" / "train.jsonl", ROWS[:3])
    assert load_split(make_task(), "train", data_dir=tmp_path).available == 3


def test_limit_draws_without_replacement_by_the_seed_alone(tmp_path: Path, random_state_untouched: None) -> None:
    task = make_task(files={"train": write_jsonl(tmp_path / "a.jsonl", ROWS)})
    everything = load_split(task, "train").examples

    def drawn(limit: int | None, seed: int = 0) -> list[str]:
        split = load_split(task, "train", limit=limit, seed=seed)
        assert split.available == len(ROWS)
        return [example.prompt for example in split.examples]

    assert [example.prompt for example in everything] == drawn(None) == drawn(20) == drawn(21)
    assert len(drawn(8)) == len(set(drawn(8))) == 8
    assert set(drawn(8)) < set(drawn(None))
    assert drawn(8) == drawn(8)
    assert len({tuple(drawn(8, seed)) for seed in range(5)}) == 5


# --- splits ------------------------------------------------------------------------------------------------------


def split_task(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Task:
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name in ("train", "test")}
    return make_task(files=files, **changes)


def test_splits_are_drawn_without_overlap_and_the_test_split_is_no_seeds(
    tmp_path: Path, random_state_untouched: None
) -> None:
    task = split_task(tmp_path)

    def drawn(seed: int) -> dict[str, tuple[int, ...]]:
        splits = load_splits(task, train_examples=8, dev_examples=5, test_examples=6, seed=seed)
        return {name: tuple(split.numbers) for name, split in splits.items()}

    assert drawn(3) == drawn(3)
    for seed in range(4):
        found = drawn(seed)
        assert {name: len(set(numbers)) for name, numbers in found.items()} == {"train": 8, "dev": 5, "test": 6}
        assert not set(found["train"]) & set(found["dev"])
        assert all(list(numbers) == sorted(numbers) for numbers in found.values())
    assert len({drawn(seed)["test"] for seed in range(4)}) == 1
    assert len({drawn(seed)["train"] for seed in range(4)}) == 4
    assert len({drawn(seed)["dev"] for seed in range(4)}) == 4


@pytest.mark.parametrize(
    ("dev", "expected"),
    [
        (10, (10, 10)),  # as many remain for training
        (11, (15, 5)),  # not: a quarter
        (4, (16, 4)),
        (500, (15, 5)),
        (0, (20, 0)),
        (None, (17, 3)),  # the task's own number
    ],
)
def test_development_split_of_short_data_is_a_quarter_at_most(
    tmp_path: Path, dev: int | None, expected: tuple[int, int]
) -> None:
    splits = load_splits(split_task(tmp_path, dev_examples=3), dev_examples=dev)
    assert (len(splits["train"]), len(splits.get("dev", []))) == expected
    assert ("dev" in splits) == bool(expected[1])


def test_the_same_training_examples_whatever_else_is_wanted(tmp_path: Path) -> None:
    task = split_task(tmp_path)
    every = load_splits(task, dev_examples=5)
    for only in (["train"], ["dev"], ["test"], ["dev", "train"]):
        some = load_splits(task, dev_examples=5, only=only)
        assert list(some) == only
        assert all(some[name].numbers == every[name].numbers for name in only)


def test_development_data_of_ones_own_are_used(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "dev.jsonl", [{"text": f"own {i}", "label": i % 2} for i in range(9)])
    task = split_task(tmp_path)
    task = Task(**{**vars(task), "files": {**task.files, "dev": own}})
    splits = load_splits(task, train_examples=100, dev_examples=4)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "dev": 4, "test": 20}
    assert all(example.prompt.startswith("own ") for example in splits["dev"].examples)
    assert load_splits(task, per_class=10)["train"].numbers == list(range(20))  # none is kept back for development


def test_so_many_of_each_class(tmp_path: Path) -> None:
    task = split_task(tmp_path, [{"text": f"{i}", "label": int(i % 4 == 0)} for i in range(24)])
    for seed in range(3):
        splits = load_splits(task, per_class=3, seed=seed)
        for name in ("train", "dev"):
            assert Counter(example.label for example in splits[name].examples) == {0: 3, 1: 3}
        assert not set(splits["train"].numbers) & set(splits["dev"].numbers)
        assert len(splits["test"]) == 24
    assert len({tuple(load_splits(task, per_class=3, seed=seed)["train"].numbers) for seed in range(4)}) == 4
    words = r"holds 6 examples of class 1 \(great\), and 4 for .* and 4 .* lower per_class to 3$"
    with pytest.raises(InputError, match=words):
        load_splits(task, per_class=4)
    assert len(load_splits(task, per_class=6, dev_examples=0)["train"]) == 12
    free = split_task(tmp_path, answers=None, label="text", metric="f1")
    with pytest.raises(InputError, match=r"no classes.*leave per_class out"):
        load_splits(free, per_class=2)


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": -1 if i % 3 == 0 else i % 2} for i in range(12)]
    split = load_split(split_task(tmp_path, rows, unlabelled="-1"), "train")
    assert (split.available, list(split.numbers)) == (8, [i for i in range(12) if i % 3])
    with pytest.raises(InputError, match=r"train\.jsonl, example 1: label '-1' is not among the answers"):
        load_split(split_task(tmp_path, rows), "train")
    with pytest.raises(InputError, match="holds no example"):
        load_split(split_task(tmp_path, rows[:1], unlabelled="-1"), "train")


def test_row_is_named_by_its_place_in_the_file_whichever_rows_are_drawn(tmp_path: Path) -> None:
    task = split_task(tmp_path, [*ROWS, {"text": "", "label": 1}])
    with pytest.raises(InputError, match=r"\.jsonl, example 21: column 'text' is empty"):
        load_splits(task, dev_examples=5)


def test_split_is_judged_in_every_wording_and_put_in_the_one_that_suits(tmp_path: Path) -> None:
    masked = make_task("{text}, {other}: [MASK]")
    rows = [{**row, "other": f"other {i}"} for i, row in enumerate(ROWS)]
    splits = load_splits(split_task(tmp_path, rows, masked=masked))
    assert splits["train"].worded_for("causal").examples[0].prompt.endswith(" It was")
    assert splits["train"].worded_for("masked").examples[0].prompt.endswith(": [MASK]")
    with pytest.raises(InputError, match="no column 'other'"):
        load_splits(split_task(tmp_path, masked=masked))


BAD = [{"text": "", "label": 1}, {"text": "a", "label": 7}, {"text": None, "label": 0}, {"label": 1}]


def test_rows_that_cannot_be_used_are_counted_and_left_out_if_asked_for(tmp_path: Path) -> None:
    rows = [*ROWS[:7], *BAD[:2], *ROWS[7:], *BAD[2:]]
    good = [i for i, row in enumerate(rows) if row not in BAD]
    task = split_task(tmp_path, rows)
    with pytest.raises(BadRowsError, match=r"train\.jsonl, example 8: column 'text' is empty; .*\(4 of 24 examples cannot be"
                       r" used\): on_bad_row='skip' leaves such rows out$"):  # fmt: skip
        load_split(task, "train")
    whole = load_split(task, "train", on_bad_row="skip")
    assert (list(whole.numbers), whole.available, whole.skipped) == (good, 20, 4)
    assert "train.jsonl, example 8: column 'text' is empty" in whole.first_skipped
    for seed in range(3):
        splits = load_splits(task, dev_examples=5, on_bad_row="skip", seed=seed)
        assert sorted([*splits["train"].numbers, *splits["dev"].numbers]) == list(splits["test"].numbers) == good
        assert [splits[name].skipped for name in splits] == [4, 4, 4]
    assert len(load_splits(task, per_class=5, on_bad_row="skip")["train"]) == 10
    masked = replace(task, masked=make_task("{other}: [MASK]"))
    with pytest.raises(InputError, match=r"can use none of the 24 examples of .*train\.jsonl\. .*no column 'other'"):
        load_split(masked, "train", on_bad_row="skip")
    with pytest.raises(InputError, match="on_bad_row must be refuse or skip, got 'drop'"):
        load_split(task, "train", on_bad_row="drop")
    clean = load_split(split_task(tmp_path), "train", on_bad_row="skip")
    assert (list(clean.numbers), clean.skipped, clean.first_skipped) == (list(range(20)), 0, "")


def test_a_row_that_is_not_drawn_is_not_judged(tmp_path: Path) -> None:
    task = make_task(files={"train": write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "a", "label": 9}])})
    refused = [bool(_failure(load_split, task, "train", limit=10, seed=seed)) for seed in range(8)]
    assert len(set(refused)) == 2


# --- doubts ------------------------------------------------------------------------------------------------------


def _doubts(folder: Path, train: Any, test: Any, dev: Any = None, **changes: Any) -> list[str]:
    files = {"train": write_jsonl(folder / "train.jsonl", train)}
    files["test"] = files["train"] if test is train else write_jsonl(folder / "test.jsonl", test)
    if dev is not None:
        files["dev"] = write_jsonl(folder / "dev.jsonl", dev)
    return doubts(load_splits(make_task(files=files, **changes), dev_examples=5))


def _rows(start: int, stop: int, labels: int = 2) -> list[dict[str, Any]]:
    return [{"text": f"{i}", "label": i % labels} for i in range(start, stop)]


def test_data_that_cannot_teach_are_told(tmp_path: Path) -> None:
    assert _doubts(tmp_path, _rows(0, 20), _rows(20, 30), _rows(30, 40)) == []
    (told,) = _doubts(tmp_path, _rows(0, 20, 1), _rows(20, 30))
    assert re.match("all 15 train examples have the answer 'terrible', .*nothing else can be learnt", told)
    (told,) = _doubts(tmp_path, _rows(0, 20), _rows(20, 30, 1))
    assert told == "all 10 test examples have the answer 'terrible', so always giving it is right"
    free = {"answers": None, "metric": "f1", "loss": "likelihood"}
    (told,) = _doubts(tmp_path, _rows(0, 20, 1), _rows(20, 30), **free)
    assert told.startswith("all 15 train examples have the answer '0'")
    assert _doubts(tmp_path, _rows(0, 20), _rows(20, 30), **free) == []
    assert _doubts(tmp_path, _rows(0, 20, 1), _rows(20, 30), answers=None, label="", metric="reward", loss="none") == []
    assert len(_doubts(tmp_path, _rows(0, 20, 1), _rows(20, 30), answers={"0": "{text}", "1": "it"})) == 1


def test_rows_that_two_splits_share_are_told(tmp_path: Path) -> None:
    same = _rows(0, 20)
    (told,) = _doubts(tmp_path, same, same)
    assert told.startswith("training and test examples both come from ")
    assert "train.jsonl: give the test data another file" in told
    (told,) = _doubts(tmp_path, _rows(0, 20), _rows(20, 30), _rows(10, 15))
    assert told.startswith("5 of the 5 dev examples are also among the train examples")
    found = _doubts(tmp_path, _rows(0, 20), [*_rows(15, 20), *_rows(20, 25)], _rows(23, 28))
    assert [line.partition(":")[0] for line in found] == [
        "5 of the 10 test examples are also among the train examples",
        "2 of the 10 test examples are also among the dev examples",
    ]
    assert _doubts(tmp_path, [*_rows(0, 20), *_rows(0, 20)], _rows(20, 30))[0].endswith("says little about new ones")
    flipped = [{**row, "label": 1 - row["label"]} for row in _rows(0, 20)]
    assert _doubts(tmp_path, _rows(0, 20), flipped, _rows(30, 40)) == []  # the answer differs
    assert _doubts(tmp_path, _rows(0, 20), _rows(19, 219), _rows(300, 310)) == []  # one of 200: large data repeat some


def test_hub_out_of_reach_is_one_message_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"could not be loaded from the hub.*data_dir") as caught:
        load_split(get_task("sst2"), "train")
    assert "stanfordnlp/sst2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_labels_that_yaml_took_for_truth_values_are_said(tmp_path: Path) -> None:
    task = get_task(str(write_task(tmp_path, task_text(answers="{yes: money, no: passwords, maybe: both}"))))
    with pytest.raises(InputError, match="put the labels of the answers in quotes"):
        task.example({"text": "a", "label": "yes"}, "row 1")
