"""What data may come as, how it is read, and that every row keeps the name of its file and its place there."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from forwardtune.errors import InputError
from forwardtune.tasks import Task, doubts, get_task, given_data, load_split, load_splits
from forwardtune.tasks.encoding import Encoder
from forwardtune.tasks.rows import open_rows, read_rows
from support import tokenizer
from support.command import done, refused
from support.models import save_tiny_model

ROWS = [{"text": f"a row of text, number {i}", "label": i % 2} for i in range(12)]
TASK = "prompt: '{text} It was'\nanswers: {0: terrible, 1: great}\n"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def cells(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    quoted = (f'"{row["text"]}"{delimiter}{row["label"]}' for row in rows)
    return "\n".join([f"text{delimiter}label", *quoted]).encode()


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5)


def write_arrow(path: Path, kind: Callable[..., Any]) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with kind(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=5)


KINDS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "a.ndjson": lambda path: path.write_bytes(lines(ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.csv": lambda path: path.write_bytes(cells(ROWS)),
    "a.tsv": lambda path: path.write_bytes(cells(ROWS, "\t")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS))),
    "a.CSV.gz": lambda path: path.write_bytes(gzip.compress(cells(ROWS))),
    "a.tsv.bz2": lambda path: path.write_bytes(bz2.compress(cells(ROWS, "\t"))),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "a.parquet": write_parquet,
    "a.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "utf16.csv": lambda path: path.write_bytes(cells(ROWS).decode().encode("utf-16")),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    read = read_rows(tmp_path / name)
    assert [{**row, "label": int(row["label"])} for row in read] == ROWS
    split = load_split(get_task(str(_task(tmp_path)), str(tmp_path / name)), "train")
    assert [example.label for example in split.examples] == [row["label"] for row in ROWS]
    assert split.examples[7].where == f"{tmp_path / name}, example 8"


def _task(folder: Path, text: str = TASK) -> Path:
    path = folder / "task.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what separates cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "delimiter", "said"),
    [("a.csv", ",", ""), ("a.tsv", "\t", ""), ("a.csv", ";", "semicolons"), ("a.csv", "\t", "tabs"),
     ("a.tsv", ",", "commas"), ("a.csv", "|", "bars"), ("a.csv", "~", "'~'"), ("a.csv", "^", "'^'"), ("a.csv", ":", "':'"),
     ("a.csv", "\x01", r"'\x01'")],
)  # fmt: skip
def test_separator_is_found_and_said(tmp_path: Path, name: str, delimiter: str, said: str) -> None:
    (tmp_path / name).write_bytes(cells(ROWS, delimiter))
    assert [row["text"] for row in read_rows(tmp_path / name)] == [row["text"] for row in ROWS]
    split = load_split(get_task(str(_task(tmp_path)), str(tmp_path / name)), "train")
    assert str(split).endswith(f".{name[2:]} (cells separated by {said})" if said else name)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("text, in full;label\nfine;1\ngood;0\n", ["text, in full", "label"]),  # a comma in a name
        ("text;label\nfine, or so;1\ngood, or not;0\n", ["text", "label"]),  # a comma in every cell
        ("a text\nfine: yes\ngood\n", ["a text"]),  # one column
        ("when:what\n12:30\n", ["when", "what"]),
        ("text|label\nso, so|1\nwell, well|0\n", ["text", "label"]),
        ('"a;b",c\n"d;e",f\n', ["a;b", "c"]),
    ],
)
def test_separator_is_what_all_lines_agree_on(tmp_path: Path, content: str, names: list[str]) -> None:
    (tmp_path / "a.csv").write_text(content)
    rows = read_rows(tmp_path / "a.csv")
    assert len(rows) == len(content.splitlines()) - 1
    assert all(list(row) == names for row in rows)


def test_many_lines_one_of_which_is_wrong_are_refused_at_that_line(tmp_path: Path) -> None:
    content = cells(ROWS * 20, ";") + b"\none; too; many\n"
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(
        InputError, match=r"a\.csv, line 242 has not as many cells .* \(3, not 2\): quote .* semicolons"
    ):
        read_rows(tmp_path / "a.csv")


def test_command_line_says_the_separator(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "a.csv").write_bytes(cells(ROWS, ";"))
    ran = done(
        "eval",
        "--model",
        tmp_path / "model",
        "--task",
        _task(tmp_path),
        "--data",
        tmp_path / "a.csv",
        "--device",
        "cpu",
    )
    assert f"test: 2 of 12 examples of {tmp_path / 'a.csv'} (cells separated by semicolons)" in ran.err


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _twice(path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.parquet", _twice, "'text' is the name of two columns: rename or remove one"),
        ("a.arrow", _twice, "'text' is the name of two columns"),
        ("a.csv.gz", lambda p: p.write_bytes(gzip.compress(b"text,text\na,b\n")), "'text' is the name of two columns"),
        ("a.csv", lambda p: p.write_bytes("text;label\nok;0\nGéorgie;1\n".encode("cp1252")),
         r"not UTF-8 text \(line 3, byte 0xe9; in cp1252 the line reads 'Géorgie;1'\): .* iconv -f cp1252 -t utf-8"),
        ("a.jsonl", lambda p: p.write_bytes('{"text": "a"}\n'.encode("utf-16-le")), "not UTF-8|not JSON"),
        ("a.parquet", lambda p: p.write_bytes(b"PAR1 and so on"), "is not a whole Parquet file"),
        ("a.arrow", lambda p: p.write_bytes(b"nothing of the kind"), "is not a whole Arrow file"),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(lines(ROWS))[:-12]), "ends in the middle"),
        ("a.jsonl.gz", lambda p: p.write_bytes(lines(ROWS)), "cannot be read: Not a gzipped file"),
        ("a.parquet.gz", lambda p: p.write_bytes(b""), r"data files are JSON Lines \(\.jsonl\)"),
        ("a.xlsx", lambda p: p.write_bytes(b""), r"data files are JSON Lines \(\.jsonl\) or CSV"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, write: Callable[[Path], object], words: str) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=words) as caught:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_messages_name_the_file_and_the_row_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "1.jsonl").write_bytes(lines(ROWS[:3]))
    (folder / "2.csv").write_bytes(cells([ROWS[0], {"text": "", "label": 1}]))
    with pytest.raises(InputError, match=r"2\.csv, example 2: column 'text' is empty"):
        load_split(get_task(str(_task(tmp_path)), str(folder)), "train")
    (folder / "2.csv").write_bytes(cells([ROWS[0], {"text": "word " * 300, "label": 1}]))
    task = get_task(
        str(_task(tmp_path, "prompt: 'one two three {text}'\nanswers: {0: terrible, 1: great}")), str(folder)
    )
    with pytest.raises(InputError, match=r"2\.csv, example 1: an input of 8 tokens leaves no room"):
        Encoder(tokenizer(), 8)(task, load_split(task, "train").examples[3:4])


# --- folders, patterns, data sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["parts", "parts/part-*.jsonl", "parts/**/*.jsonl", "parts/part-[01]*"])
def test_folder_or_pattern_is_read_in_the_order_of_its_names(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "parts" / "inner").mkdir(parents=True)
    (tmp_path / "parts" / "README.md").write_text("no data")
    for i, where in enumerate(["part-00.jsonl", "part-01.jsonl", "part-10.jsonl"]):
        (tmp_path / "parts" / where).write_bytes(lines(ROWS[4 * i : 4 * i + 4]))
    task = get_task(str(_task(tmp_path, f"{TASK}train: '{pattern}'\n")))
    split = load_split(task, "train")
    assert [example.row["text"] for example in split.examples] == [row["text"] for row in ROWS]
    assert split.examples[5].where == f"{tmp_path / 'parts' / 'part-01.jsonl'}, example 2"


def test_folder_says_which_split_each_file_is_for(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", ROWS[:6]), ("validation", ROWS[6:8]), ("test", ROWS[8:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    splits = load_splits(get_task(str(_task(tmp_path)), str(folder)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "dev": 2, "test": 4}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS[:8]), ("validation", ROWS[8:]))}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(get_task(str(_task(tmp_path)), str(tmp_path / "saved")), dev_examples=2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "dev": 2, "test": 4}


def test_test_examples_are_set_aside_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": f"{i}", "label": i % 2} for i in range(100)]))
    task = get_task(str(_task(tmp_path)), str(tmp_path / "a.jsonl"))
    drawn = [load_splits(task, dev_examples=10, seed=seed) for seed in (0, 1)]
    for splits in drawn:
        numbers = {name: set(split.numbers) for name, split in splits.items()}
        assert {name: len(found) for name, found in numbers.items()} == {"train": 70, "dev": 10, "test": 20}
        assert len(set.union(*numbers.values())) == 100
    assert drawn[0]["test"].numbers == drawn[1]["test"].numbers
    assert drawn[0]["train"].numbers != drawn[1]["train"].numbers
    assert load_splits(task, only=["test"])["test"].numbers == drawn[0]["test"].numbers
    assert doubts(drawn[0]) == []  # of one file, and no row twice
    (tmp_path / "few.jsonl").write_bytes(lines(ROWS[:4]))
    with pytest.raises(InputError, match="4 rows are too few to set some aside for tests"):
        load_splits(get_task(str(_task(tmp_path)), str(tmp_path / "few.jsonl")))


def _like_a_hub(folder: Path) -> Path:
    """A folder as the hub lays a data set out, with two configurations."""
    for name, rows in (("short", ROWS[:5]), ("long", ROWS)):
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_bytes(lines(rows))
    parts = [
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/train.jsonl}}, {{split: test, path: {name}/test.jsonl}}]"
        for name in ("short", "long")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(parts) + "\n---\n")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_of_the_hub_has_configurations_and_may_be_streamed(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_data, "STREAMED", 8)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    where = _like_a_hub(tmp_path / "hub")
    hub = f"{{path: {where}, name: long, train: train, test: test, streaming: {str(streaming).lower()}}}"
    split = load_split(get_task(str(_task(tmp_path, f"{TASK}hub: {hub}\n"))), "test")
    assert [row["text"] for row in split.rows] == [row["text"] for row in ROWS[: 8 if streaming else 12]]
    assert split.examples[2].where == f"{where} (test), example 3"
    assert ("(the first 8 rows)" in str(split)) == streaming


def test_hub_id_may_name_a_configuration_and_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach here: what is asked of the library is looked at."""
    asked: list[Any] = []

    def names(*arguments: Any, **options: Any) -> list[str]:
        asked.append((arguments, options))
        return ["train", "validation"]

    def load(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = get_task("reviews", "someone/some-data:long@v2", streaming=True)
    assert asked.pop() == (("someone/some-data", "long"), {"revision": "v2"})
    assert task.hub == {
        "path": "someone/some-data",
        "name": "long",
        "revision": "v2",
        "train": "train",
        "test": "validation",
    }
    given_data.open_split(task, "test")
    assert asked.pop() == (("someone/some-data", "long"), {"split": "validation", "streaming": True, "revision": "v2"})


def test_files_are_streamed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_data, "STREAMED", 8)
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS) + b"this line is never read\n")
    split = load_split(get_task(str(_task(tmp_path)), str(tmp_path / "a.jsonl"), streaming=True), "train")
    assert len(split) == 8
    assert str(split).endswith("a.jsonl (the first 8 rows)")
    opened = open_rows(tmp_path / "a.jsonl")
    assert next(opened.rows) == ROWS[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("none.jsonl", r"none\.jsonl: there is no such data file"),
        ("som.jsonl", r"there is no such data file; did you mean some\.jsonl\?"),
        ("a/very/long/way/to/what/is/not/there.csv", r"there is no such data file$"),
        ("none/*.csv", r"no data file has such a name"),
        ("empty", "empty holds no data file"),
        ("no-such/data-set", r"data set no-such/data-set could not be loaded .*there is no such file or folder either"),
        ("a:b:c", "'a:b:c' names no data"),
    ],
)
def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a/very/long/way/to/what/is/not").mkdir(parents=True)
    (tmp_path / "a/very/long/way/to/what/is/not/x.csv").write_bytes(cells(ROWS))
    task = _task(tmp_path)
    with refused(tmp_path, words) as ran:
        from support.command import cli

        ran(cli("eval", "--model", "nothing", "--task", task, "--data", data))


def test_task_without_data_says_how_to_give_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names no data: give files .*data=\.\.\. beside it"):
        get_task(str(_task(tmp_path)))


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "label", "expected"),
    [
        (("0", "1"), 1.0, "1"), (("0", "1"), True, "1"), (("0", "1"), "false", "0"),
        (("no", "yes"), 1.0, "yes"), (("no", "yes"), True, "yes"), (("no", "yes"), "0", "no"), (("no", "yes"), "Y", "yes"),
        (("No", "Yes"), "FALSE", "No"), (("False", "True"), "yes", "True"), (("off", "on"), "1.0", "on"),
        # Nobody said that yes is 1, or which of three it is.
        (("0", "1"), "yes", "yes"), (("no", "yes", "maybe"), "1", "1"), (("no", "yes", "true"), "on", "on"), (("no", "yes"), "2", "2"),
    ],
)  # fmt: skip
def test_numbers_and_words_for_yes_are_one_label(answers: tuple[str, ...], label: Any, expected: str) -> None:
    texts = {answer: f"text {i}" for i, answer in enumerate(answers)}
    assert Task("t", "{text}", "label", texts, "accuracy").label_of(label) == expected
