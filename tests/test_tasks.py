"""Task files, data files and metrics: what a task means, and one clear message for every way to be wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forwardtune.errors import InputError
from forwardtune.tasks import Task, get_task, load_split, metrics, task_names
from forwardtune.tasks.task import read_task

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


def test_every_task_of_the_package_reads_and_carries_its_file_name() -> None:
    assert {"reviews", "sst2"} <= set(task_names())
    for name in task_names():
        assert get_task(name).name == name


def test_sst2_prompts_of_the_real_data_are_the_papers(data_dir: Path) -> None:
    for split, file in (("train", "train"), ("test", "validation")):
        lines = (data_dir / "sst2" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        loaded = load_split(get_task("sst2"), split, data_dir=data_dir)
        assert loaded.available == len(loaded.examples) == len(rows)
        for row, example in zip(rows[:50], loaded.examples, strict=False):
            assert example.prompt == row["sentence"].rstrip(" ") + " It was"
            assert example.options == (" terrible", " great")
            assert example.label == row["label"]


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "value", "expected"),
    [
        ("{text} It was", "  fine \n", "fine It was"),
        ("{text} It was", "a {label} of {{braces}} {", "a {label} of {{braces}} { It was"),
        ("{text} It was", "%s %(text)s {0} \\1 \\g<1>", "%s %(text)s {0} \\1 \\g<1> It was"),
        ("{{text}} {text}", "fine", "{text} fine"),
        ("{text} or {text}?", "a", "a or a?"),
        ("{text} }} {{", "a", "a } {"),
        ("{text}", 7, "7"),
        ("{text}", False, "False"),
        ("{text}", 0, "0"),
    ],
)
def test_template_is_plain_substitution_of_stripped_values(prompt: str, value: Any, expected: str) -> None:
    assert make_task(prompt).example({"text": value, "label": 1}, "row 1").prompt == expected


@pytest.mark.parametrize(
    "placeholder", ["text.__class__", "text!r", "text:>30", "text[0]", "0", " text", ""], ids=lambda name: f"[{name}]"
)
def test_format_language_is_no_language_but_an_unknown_column(placeholder: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(placeholder))):
        make_task(f"{{text}} {{{placeholder}}}").example({"text": "a", "label": 1}, "row 1")


@pytest.mark.parametrize(("prompt", "joint"), [("{text} It was", " "), ("{text}\n", ""), ("{text} ", "")])
def test_answers_are_joined_by_one_space_unless_the_prompt_ends_in_white_space(prompt: str, joint: str) -> None:
    row = {"text": "a", "label": "1"}
    assert make_task(prompt).example(row, "").options == (f"{joint}terrible", f"{joint}great")
    free = make_task(prompt, answers=None, label="text", metric="f1").example(row, "")
    assert (free.target, free.options) == (f"{joint}a", ())


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
    ],
)
def test_labels_may_be_numbers_texts_or_booleans(tmp_path: Path, keys: str, label: Any, expected: int) -> None:
    task = read_task(write_task(tmp_path, f"prompt: '{{text}}'\nanswers: {{{keys}}}\ntrain: a.csv\n"))
    assert task.example({"text": "a", "label": label}, "").label == expected


def test_yes_and_no_are_words_or_refused_but_never_turn_into_true_and_false(tmp_path: Path) -> None:
    """Plain YAML reads an unquoted ``no`` as false."""
    path = write_task(tmp_path, "prompt: '{text}'\nanswers: {0: no, 1: yes}\ntrain: a.csv\n")
    answers = {} if "quote" in _failure(read_task, path) else read_task(path).answers or {}
    assert all(text in ("no", "yes", "No", "Yes") for text in answers.values())


def _failure(do: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message with which it is refused, empty if it is not."""
    try:
        do(*arguments, **options)
    except InputError as error:
        return str(error)
    return ""


# --- task files --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "'{text} It was'", "answers": "{0: terrible, 1: great}", "train": "train.csv", "test": "test.csv"}


def task_text(**changes: str | None) -> str:
    lines = {**GOOD, **changes}
    return "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)


def test_task_file_defaults(tmp_path: Path) -> None:
    task = get_task(str(write_task(tmp_path, task_text())))
    assert (task.name, task.label, task.metric, task.stop) == ("mine", "label", "accuracy", "\n")
    assert task.answers == {"0": "terrible", "1": "great"}
    assert task.columns == ["text", "label"]
    assert task.files == {"train": tmp_path / "train.csv", "test": tmp_path / "test.csv"}
    free = read_task(write_task(tmp_path, task_text(answers=None, target="reply")))
    assert (free.answers, free.label, free.metric) == (None, "reply", "f1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: [unclosed", "not valid YAML"),
        ("prompt: !!python/object/apply:os.getcwd []\n", "not valid YAML.*python/object"),
        ("just words", "must hold keys"),
        ("", "must hold keys"),
        (task_text(promt="'{text}'"), "unknown key 'promt'.*did you mean prompt"),
        (task_text(prompt=None), "prompt must be text"),
        (task_text(prompt="no column"), r"at least one \{column\}"),
        (task_text(prompt="'{{text}}'"), r"at least one \{column\}"),
        (task_text(target="reply"), "answers, or target"),
        (task_text(answers=None), "at least two"),
        (task_text(answers="{0: great}"), "at least two"),
        (task_text(answers="{1: great, '1': terrible}"), "at least two|twice|same label"),
        (task_text(answers="[a, b]"), "answers must map"),
        (task_text(answers="{0: '', 1: great}"), "not text: put it in quotes"),
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
    ],
    ids=lambda text: text.splitlines()[-1][:40] if "\n" in text else None,
)
def test_what_is_wrong_in_a_task_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = write_task(tmp_path, text)
    with pytest.raises(InputError, match=words) as caught:
        get_task(str(path))
    assert str(path) in str(caught.value)


def test_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown task 'reviws'.*reviews, sst2.*did you mean reviews"):
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
    ],
)
def test_malformed_data_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


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
    assert load(tmp_path / "a.csv").examples == examples


@pytest.mark.parametrize(
    "place", ["t/validation.jsonl", "t/validation.csv", "t/test.jsonl", "validation.csv", "test.jsonl"]
)
def test_data_dir_is_searched_by_task_and_by_the_data_sets_own_split_names(tmp_path: Path, place: str) -> None:
    task = make_task(hub={"path": "a/b", "train": "train", "test": "validation"})
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label\na,1\n" if path.suffix == ".csv" else '{"text": "a", "label": 1}\n')
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


def test_a_row_that_is_not_drawn_is_not_judged(tmp_path: Path) -> None:
    task = make_task(files={"train": write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "a", "label": 9}])})
    refused = [bool(_failure(load_split, task, "train", limit=10, seed=seed)) for seed in range(8)]
    assert len(set(refused)) == 2


def test_hub_out_of_reach_is_one_message_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"could not be loaded from the hub.*--data-dir") as caught:
        load_split(get_task("sst2"), "train")
    assert "stanfordnlp/sst2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "truth", "f1", "exact"),
    [
        ("The Cat.", "cat", 1, 1),
        ("a cat sat", "the cat ran", 1 / 2, 0),  # cat sat | cat ran: 2 * 1 / 4
        ("Denver Broncos", "the Denver Broncos, Inc.", 4 / 5, 0),  # 2 * 2 / (2 + 3)
        ("to be or not to be", "to be", 1 / 2, 0),  # counted with repetition: 2 * 2 / (6 + 2)
        ("to be to", "to to do", 2 / 3, 0),  # "to" is shared twice: 2 * 2 / (3 + 3)
        ("state-of-the-art", "stateoftheart", 1, 1),  # punctuation goes before articles do
        ("1,000", "1000", 1, 1),
        ("  two\n words ", "two words", 1, 1),
        ("the", "an", 1, 1),  # both are empty once normalised
        ("", "cat", 0, 0),
        ("cat", "the", 0, 0),
        ("dog", "cat", 0, 0),
    ],
)
def test_squad_metrics_by_hand(prediction: str, truth: str, f1: float, exact: int) -> None:
    assert metrics.f1(prediction, truth) == pytest.approx(f1, abs=1e-12)
    assert metrics.f1(truth, prediction) == pytest.approx(f1, abs=1e-12)
    assert metrics.exact_match(prediction, truth) == exact
