"""From files or the hub to examples."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .task import Example, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        task: what they are examples of.
        examples: the chosen ones.
        source: where they come from, for people.
        available: how many there were to choose from.
    """

    task: Task
    examples: Sequence[Example]
    source: str
    available: int


def load_split(
    task: Task, split: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Split:
    """Load the ``train`` or ``test`` examples of a task.

    Args:
        data_dir: a folder with the task's data in files named after the data set's splits (``train.jsonl``,
            ``validation.csv``), directly or in a folder named after the task; instead of the task's own source.
        limit: at most this many, drawn without replacement by ``seed``.

    Raises:
        InputError: a missing or malformed file, an empty split, or a row that the task cannot use.
    """
    if data_dir is not None:
        path = _in_folder(task, split, Path(data_dir))
        rows, source = _read(path), str(path)
    elif task.hub is not None:
        rows, source = _from_hub(task, split), f"{task.hub['path']} ({task.hub[split]})"
    elif split in task.files:
        rows, source = _read(task.files[split]), str(task.files[split])
    else:
        raise InputError(f"task {task.name} has no {split} file: add '{split}: FILE' to its task file")
    if not rows:
        raise InputError(f"{source} holds no example")
    numbers = range(len(rows))
    if limit is not None and limit < len(rows):
        numbers = sorted(random.Random(f"{seed} {task.name} {split}").sample(numbers, limit))  # type: ignore[assignment]
    examples = [task.example(rows[i], f"{source}, example {i + 1}") for i in numbers]
    return Split(task, examples, source, len(rows))


def _in_folder(task: Task, split: str, folder: Path) -> Path:
    names = [split] if task.hub is None else [task.hub[split], split]
    tried = [
        parent / f"{name}{suffix}"
        for parent in (folder / task.name, folder)
        for name in names
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
