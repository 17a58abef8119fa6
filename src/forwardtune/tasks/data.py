"""From rows to examples: loading them from files or the hub, and drawing the splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import InputError
from ..names import ON_BAD_ROW
from .rows import SUFFIXES, Row, read_rows
from .splits import RULES, Wanted, sample
from .task import Example, Task, same_label
from .template import RowError

#: What can be done about rows that a task cannot use.


class BadRowsError(InputError):
    """Rows that a task cannot use.

    Attributes:
        first: what is wrong with the first of them.
        count, total: how many there are, of how many.
    """

    def __init__(self, first: str, count: int, total: int) -> None:
        self.first, self.count, self.total = first, count, total
        super().__init__(f"{self.told}: on_bad_row='skip' leaves such rows out")

    @property
    def told(self) -> str:
        """The message without a remedy for all of them."""
        return f"{self.first} ({self.count} of {self.total} examples cannot be used)"


@dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        task: what they are examples of.
        rows: the chosen rows.
        numbers: their places in the source, from 0.
        source: where they come from, for people.
        available: how many there were to choose from.
        skipped: how many rows of the source were left out because the task cannot use them.
        first_skipped: what is wrong with the first of them.
    """

    task: Task
    rows: Sequence[Row]
    numbers: Sequence[int]
    source: str
    available: int
    skipped: int = 0
    first_skipped: str = ""

    @cached_property
    def examples(self) -> list[Example]:
        """The rows as the task words them.

        Raises:
            BadRowsError: a row that the task cannot use.
        """
        try:
            return [self.task.example(row, place) for row, place in self._placed()]
        except RowError as error:
            bad = sum(_what_is_wrong(self.task, row, place) is not None for row, place in self._placed())
            raise BadRowsError(str(error), bad, len(self)) from None

    def _placed(self) -> Iterator[tuple[Row, str]]:
        """Every row with its place in the source, for messages."""
        return ((row, f"{self.source}, example {i + 1}") for row, i in zip(self.rows, self.numbers, strict=True))

    def without_bad_rows(self) -> Split:
        """The rows that the task can use in all of its wordings."""
        wrong = [
            next(filter(None, (_what_is_wrong(wording, row, place) for wording in self.task.wordings)), None)
            for row, place in self._placed()
        ]
        bad = [message for message in wrong if message is not None]
        if not bad:
            return self
        if len(bad) == len(self):
            raise InputError(f"the task can use none of the {len(self)} examples of {self.source}. {bad[0]}")
        kept = [i for i, message in enumerate(wrong) if message is None]
        return replace(_take(self, kept), available=len(kept), skipped=len(bad), first_skipped=bad[0])

    def worded_for(self, kind: str) -> Split:
        """The split as it is put to a ``causal`` or a ``masked`` model."""
        return replace(self, task=self.task.worded_for(kind))

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        chosen = f"all {self.available}" if len(self) == self.available else f"{len(self)} of {self.available}"
        return f"{chosen} examples of {self.source}"


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

    ``on_bad_row`` is as in :func:`load_splits`.

    Raises:
        InputError: as :func:`load_splits`.
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
    if "test" in only:
        whole = _load(task, "test", data_dir, on_bad_row)
        splits["test"] = _take(whole, rule.test(task, len(whole), wanted))
    if "train" in only or ("dev" in only and not own_dev):
        whole = _load(task, "train", data_dir, on_bad_row)
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
    if data_dir is not None:
        path = _in_folder(task, split, Path(data_dir))
        rows, source = read_rows(path), str(path)
    elif task.hub is not None:
        rows, source = _from_hub(task, split), f"{task.hub['path']} ({task.hub[split]})"
    elif split in task.files:
        rows, source = read_rows(task.files[split]), str(task.files[split])
    else:
        raise InputError(f"task {task.name} has no {split} file: add '{split}: FILE' to its task file")
    if (known_as := (task.hub or {}).get("label")) is not None:
        rows = [_labelled(row, task.label, known_as) for row in rows]
    rows = [_with_label(row, task) for row in rows]
    labelled = [i for i, row in enumerate(rows) if not _is_unlabelled(row, task)]
    if not labelled:
        raise InputError(f"{source} holds no example")
    whole = Split(task, [rows[i] for i in labelled], labelled, source, len(labelled))
    return whole.without_bad_rows() if on_bad_row == "skip" else whole


def _with_label(row: Row, task: Task) -> Row:
    """The row with its label as the task's answers spell it."""
    value = row.get(task.label)
    label = task.label_of(value)
    return {**row, task.label: label} if value is not None and label != str(value).strip() else row


def _is_unlabelled(row: Row, task: Task) -> bool:
    return task.unlabelled is not None and same_label(str(row.get(task.label)), task.unlabelled)


def _what_is_wrong(task: Task, row: Row, place: str) -> str | None:
    try:
        task.example(row, place)
    except RowError as error:
        return str(error)
    return None


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
        for suffix in SUFFIXES
    ]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(f"no {split} data for task {task.name} in {folder}: looked for {', '.join(map(str, tried))}")


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
