"""From rows to examples: loading them from files or the hub, and drawing the splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import InputError
from ..names import ON_BAD_ROW
from .given_data import open_split
from .media import require_text
from .rows import SUFFIXES, Row
from .sources import Source, read_files
from .splits import RULES, Wanted, sample, set_aside
from .task import Example, Task, same_label
from .template import RowError


class BadRowsError(InputError):
    """Rows that a task cannot use: what is wrong with the ``first``, and the ``count`` of them among ``total``."""

    def __init__(self, first: str, count: int, total: int) -> None:
        self.first, self.count, self.total = first, count, total
        super().__init__(
            f"{first} ({count} of {total} examples cannot be used): on_bad_row='skip' leaves such rows out",
            "on_bad_row",
        )


@dataclass(frozen=True)
class Split:
    """The examples of one split."""

    task: Task
    rows: Sequence[Row]  # those that were chosen
    numbers: Sequence[int]  # their places in the source, from 0
    origin: Source  # where they come from
    available: int  # how many there were to choose from
    skipped: int = 0  # how many rows of the source were left out because the task cannot use them
    first_skipped: str = ""  # what is wrong with the first of them

    @property
    def source(self) -> str:
        """Where the rows come from, for people."""
        return self.origin.name

    @cached_property
    def examples(self) -> list[Example]:
        """The rows as the task words them. Raises BadRowsError: a row that the task cannot use."""
        tried = self._tried(self.task)
        bad = [error for error in tried if isinstance(error, RowError)]
        if bad:
            raise BadRowsError(str(bad[0]), len(bad), len(self))
        return [example for example in tried if isinstance(example, Example)]

    def _tried(self, wording: Task) -> list[Example | RowError]:
        """Every row as an example, or what is wrong with it."""
        tried: list[Example | RowError] = []
        for row, number in zip(self.rows, self.numbers, strict=True):
            try:
                tried.append(wording.example(row, self.origin.where(number)))
            except RowError as error:
                tried.append(error.with_traceback(None))
        return tried

    def without_bad_rows(self) -> Split:
        """The rows that the task can use in all of its wordings."""
        of_rows = zip(*map(self._tried, self.task.wordings), strict=True)
        wrong = [next((str(one) for one in tried if isinstance(one, RowError)), None) for tried in of_rows]
        bad = [message for message in wrong if message is not None]
        if not bad:
            return self
        if len(bad) == len(self):
            raise InputError(f"the task can use none of the {len(self)} examples of {self.source}. {bad[0]}")
        kept = _take(self, [i for i, message in enumerate(wrong) if message is None])
        return replace(kept, available=len(kept), skipped=len(bad), first_skipped=bad[0])

    def worded_for(self, kind: str) -> Split:
        """The split as it is put to a ``causal`` or a ``masked`` model."""
        return replace(self, task=self.task.worded_for(kind))

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        chosen = f"all {self.available}" if len(self) == self.available else f"{len(self)} of {self.available}"
        remarks = f" ({', '.join(self.origin.remarks)})" if self.origin.remarks else ""
        return f"{chosen} examples of {self.source}{remarks}"


def load_split(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad_row: str = "refuse",
) -> Split:
    """All ``train``, ``dev`` or ``test`` data of a task, or ``limit`` of them drawn by ``seed`` without replacement.

    ``data_dir`` and ``on_bad_row`` are as in :func:`load_splits`, and so is what is raised.
    """
    whole = _load(task, split, data_dir, on_bad_row)
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
    on_bad_row: str = "refuse",
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
        on_bad_row: ``refuse`` a drawn row that the task cannot use (a column that is missing or empty, a label that is not
            among the answers), or ``skip`` all such rows before anything is drawn, and count them.

    Raises:
        InputError: a missing or malformed file, an empty split, too few examples of a class, or a row that the task
            cannot use.
    """
    splits: dict[str, Split] = {}
    rule, devs = RULES[task.splits], task.dev_examples if dev_examples is None else dev_examples
    own_dev = data_dir is None and "dev" in (task.hub or task.files)
    wanted = Wanted(train_examples, 0 if own_dev else devs, test_examples, per_class, seed)
    rest: Split | None = None
    if task.holds_out and data_dir is None:
        whole = _load(task, "train", data_dir, on_bad_row)
        test, others = set_aside(len(whole), test_examples, task.name)
        splits["test"], rest = _take(whole, test), replace(_take(whole, others), available=len(others))
    elif "test" in only:
        whole = _load(task, "test", data_dir, on_bad_row)
        splits["test"] = _take(whole, rule.test(task, len(whole), wanted))
    if "train" in only or ("dev" in only and not own_dev):
        whole = _load(task, "train", data_dir, on_bad_row) if rest is None else rest
        labels = [str(row.get(task.label)).strip() for row in whole.rows]
        train, dev = rule.train_and_dev(task, labels, whole.source, wanted)
        splits["train"], splits["dev"] = _take(whole, train), _take(whole, dev)
    if "dev" in only and own_dev:
        splits["dev"] = load_split(task, "dev", limit=devs, seed=seed, on_bad_row=on_bad_row)
    splits = {name: splits[name] for name in only if len(splits[name]) or name != "dev"}
    for split in splits.values():
        for wording in task.wordings:  # a row that cannot be used is refused before a model is loaded
            replace(split, task=wording).examples  # noqa: B018
    return splits


def _take(whole: Split, places: Sequence[int]) -> Split:
    """Those examples of a split, in the order of the source."""
    places = sorted(places)
    return replace(whole, rows=[whole.rows[i] for i in places], numbers=[whole.numbers[i] for i in places])


def _load(task: Task, split: str, data_dir: str | Path | None, on_bad_row: str) -> Split:
    """All labelled rows of a task's data, with labels as its answers spell them."""
    if on_bad_row not in ON_BAD_ROW:
        raise InputError(f"on_bad_row must be {' or '.join(ON_BAD_ROW)}, got {on_bad_row!r}")
    origin = open_split(task, split) if data_dir is None else read_files(_in_folder(task, split, Path(data_dir)))
    require_text(origin.rows, origin.where)
    rows = [_with_label(row, task) for row in origin.rows]
    unlabelled = task.unlabelled
    labelled = [
        i for i, row in enumerate(rows) if unlabelled is None or not same_label(str(row.get(task.label)), unlabelled)
    ]
    if not labelled:
        raise InputError(f"{origin.name} holds no example")
    whole = Split(task, [rows[i] for i in labelled], labelled, replace(origin, rows=[]), len(labelled))
    return whole.without_bad_rows() if on_bad_row == "skip" else whole


def _with_label(row: Row, task: Task) -> Row:
    """The row with its label under the task's name for it, as the task's answers spell it."""
    known_as = (task.hub or {}).get("label")
    if known_as in row and task.label not in row:
        row = {**row, task.label: row[known_as]}
    value = row.get(task.label)
    label = task.label_of(value)
    return {**row, task.label: label} if value is not None and label != str(value).strip() else row


def _in_folder(task: Task, split: str, folder: Path) -> Path:
    names = [split] if task.hub is None else [task.hub[split], split]
    if split == "test":
        names.append("validation")
    tried = [
        parent / f"{name}{suffix}"
        for parent in (folder / task.name, folder)
        for name in dict.fromkeys(names)
        for suffix in SUFFIXES
    ]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(
        f"no {split} data for task {task.name} in {folder}: looked for {tried[0]}, {tried[1]} and so on, and for "
        f"{' and '.join(names)} in {folder} itself"
    )
