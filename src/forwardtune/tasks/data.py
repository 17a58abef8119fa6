"""From files or the hub to examples: reading rows, and drawing the splits."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from .splits import RULES, Wanted, sample
from .task import Example, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        task: what they are examples of.
        rows: the chosen rows.
        numbers: their places in the source, from 0.
        source: where they come from, for people.
        available: how many there were to choose from.
    """

    task: Task
    rows: Sequence[Row]
    numbers: Sequence[int]
    source: str
    available: int

    @cached_property
    def examples(self) -> list[Example]:
        """The rows as the task words them.

        Raises:
            InputError: a row that the task cannot use.
        """
        places = [f"{self.source}, example {number + 1}" for number in self.numbers]
        return [self.task.example(row, place) for row, place in zip(self.rows, places, strict=True)]

    def worded_for(self, kind: str) -> Split:
        """The split as it is put to a ``causal`` or a ``masked`` model."""
        return replace(self, task=self.task.worded_for(kind))

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        chosen = f"all {self.available}" if len(self) == self.available else f"{len(self)} of {self.available}"
        return f"{chosen} examples of {self.source}"


def load_split(
    task: Task, split: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Split:
    """All ``train``, ``dev`` or ``test`` data of a task, or ``limit`` of them drawn by ``seed`` without replacement.

    Raises:
        InputError: as :func:`load_splits`.
    """
    whole = _load(task, split, data_dir)
    if limit is not None and limit < len(whole):
        whole = _take(whole, sample(task, split, len(whole), limit, seed))
    whole.examples  # noqa: B018  # what cannot be used is refused now
    return whole


def load_splits(
    task: Task,
    *,
    data_dir: str | Path | None = None,
    train_examples: int = 1000,
    dev_examples: int | None = None,
    test_examples: int = 1000,
    per_class: int | None = None,
    seed: int = 0,
    only: Sequence[str] = ("train", "dev", "test"),
) -> dict[str, Split]:
    """Draw the ``train``, ``dev`` and ``test`` splits of a task, without replacement, by its rule (:mod:`.splits`).

    Training and development examples are drawn by ``seed`` from the training data and share no example; test examples
    come from the test data. A task with development data of its own takes them from there.

    Args:
        data_dir: a folder with the task's data in files named after the data set's splits (``train.jsonl``,
            ``validation.csv``), directly or in a folder named after the task; instead of the task's own source.
        train_examples, dev_examples, test_examples: at most so many; ``dev_examples`` defaults to the task's own number.
        per_class: draw so many training examples of each class, and as many development examples, instead
            (the MeZO paper's masked models: 16 or 512).
        only: the splits that are wanted.

    Raises:
        InputError: a missing or malformed file, an empty split, too few examples of a class, or a row that the task
            cannot use.
    """
    splits: dict[str, Split] = {}
    rule, devs = RULES[task.splits], task.dev_examples if dev_examples is None else dev_examples
    own_dev = data_dir is None and "dev" in (task.hub or task.files)
    wanted = Wanted(train_examples, 0 if own_dev else devs, test_examples, per_class, seed)
    if "test" in only:
        whole = _load(task, "test", data_dir)
        splits["test"] = _take(whole, rule.test(task, len(whole), wanted))
    if "train" in only or ("dev" in only and not own_dev):
        whole = _load(task, "train", data_dir)
        labels = [str(row.get(task.label)).strip() for row in whole.rows]
        train, dev = rule.train_and_dev(task, labels, whole.source, wanted)
        splits["train"], splits["dev"] = _take(whole, train), _take(whole, dev)
    if "dev" in only and own_dev:
        splits["dev"] = load_split(task, "dev", limit=devs, seed=seed)
    splits = {name: splits[name] for name in only if len(splits[name]) or name != "dev"}
    for split in splits.values():
        for wording in task.wordings:  # a row that cannot be used is refused before a model is loaded
            replace(split, task=wording).examples  # noqa: B018
    return splits


def _take(whole: Split, places: Sequence[int]) -> Split:
    """Those examples of a split, in the order of the source."""
    places = sorted(places)
    return replace(whole, rows=[whole.rows[i] for i in places], numbers=[whole.numbers[i] for i in places])


def _load(task: Task, split: str, data_dir: str | Path | None) -> Split:
    """All labelled rows of a task's data."""
    if data_dir is not None:
        path = _in_folder(task, split, Path(data_dir))
        rows, source = _read(path), str(path)
    elif task.hub is not None:
        rows, source = _from_hub(task, split), f"{task.hub['path']} ({task.hub[split]})"
    elif split in task.files:
        rows, source = _read(task.files[split]), str(task.files[split])
    else:
        raise InputError(f"task {task.name} has no {split} file: add '{split}: FILE' to its task file")
    if (known_as := (task.hub or {}).get("label")) is not None:
        rows = [_labelled(row, task.label, known_as) for row in rows]
    labelled = [
        i for i, row in enumerate(rows) if task.unlabelled is None or str(row.get(task.label)) != task.unlabelled
    ]
    if not labelled:
        raise InputError(f"{source} holds no example")
    return Split(task, [rows[i] for i in labelled], labelled, source, len(labelled))


def _labelled(row: Row, label: str, known_as: str) -> Row:
    """The row with its label under the task's name for it; true and false are 1 and 0."""
    if label in row or known_as not in row:
        return row
    value = row[known_as]
    return {**row, label: int(value) if isinstance(value, bool) else value}


def _in_folder(task: Task, split: str, folder: Path) -> Path:
    names = [split] if task.hub is None else [task.hub[split], split]
    if split == "test":
        names.append("validation")
    tried = [
        parent / f"{name}{suffix}"
        for parent in (folder / task.name, folder)
        for name in dict.fromkeys(names)
        for suffix in (".jsonl", ".csv")
    ]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(f"no {split} data for task {task.name} in {folder}: looked for {', '.join(map(str, tried))}")


def _read(path: Path) -> list[Row]:
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: data files are JSON Lines (.jsonl) or CSV (.csv)")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(reader(path, file))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such data file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, for example with iconv -t utf-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not JSON ({error.msg}): one object a line is expected"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object with named columns")
        yield row


def _csv(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 128 KiB
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, line {reader.line_num} has not as many cells as the first line has names: "
                    "quote cells that hold commas"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _from_hub(task: Task, split: str) -> list[Row]:
    assert task.hub is not None
    try:
        import datasets
    except ImportError:
        raise InputError("data sets of the hub need the datasets package: pip install datasets") from None
    try:
        data = datasets.load_dataset(task.hub["path"], task.hub.get("name"), split=task.hub[split])
    except Exception as error:  # the hub's client has many errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"data set {task.hub['path']} could not be loaded from the hub ({reason}): check the network, or give a "
            "local copy with --data-dir"
        ) from None
    return list(data)
