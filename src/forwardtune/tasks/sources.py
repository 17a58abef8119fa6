"""Where a task's rows come from: a file, a folder, a pattern of names, or a data set of the hub."""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import columnar
from .rows import SUFFIXES, Row, open_rows

#: Of data that are streamed, so many rows are read, and splits are drawn of these.
STREAMED = 10_000


@dataclass(frozen=True)
class Source:
    """Rows, and the file and number of each.

    Attributes:
        name: what the rows come from, for people.
        begins: (number of a file's first row among all, the file), in their order.
        remarks: how it was read, where that is worth a word.
    """

    name: str
    rows: list[Row]
    begins: list[tuple[int, str]]
    remarks: tuple[str, ...] = ()

    def where(self, number: int) -> str:
        """The file and the row, counted from 1, of a row that has this number among all, counted from 0."""
        first, file = self.begins[bisect_right(self.begins, number, key=lambda begin: begin[0]) - 1]
        return f"{file}, example {number - first + 1}"


@dataclass
class _Reading:
    begins: list[tuple[int, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    count: int = 0

    def rows(self, paths: list[Path]) -> Iterator[Row]:
        for path in paths:
            opened = open_rows(path)
            self.begins.append((self.count, str(path)))
            if opened.remark:
                self.remarks.append(opened.remark)
            for row in opened.rows:
                self.count += 1
                yield row


def read_files(path: Path, limit: int | None = None) -> Source:
    """The rows, or the first of them, of a data file, of the data files in a folder, or of those that a pattern such as
    ``part-*.csv`` names.

    Raises:
        InputError: there is none, or one cannot be read (:func:`.rows.open_rows`).
    """
    reading = _Reading()
    rows = reading.rows(data_files(path))
    read = list(islice(rows, limit))
    return Source(str(path), read, reading.begins, (*dict.fromkeys(reading.remarks), *_cut(rows, limit)))


def data_files(path: Path) -> list[Path]:
    """The files that a path names, in the order of their names. A saved data set counts as one."""
    if path.is_dir() and not columnar.is_saved(path) and path.suffix not in SUFFIXES:
        found = [file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES) and file.is_file()]
        if not found:
            raise InputError(f"{path} holds no data file ({', '.join(SUFFIXES[:7])}): name one, or a folder that does")
        return sorted(found)
    if glob.has_magic(str(path)) and not path.exists():
        named = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not named:
            raise InputError(f"{path}: no data file has such a name")
        return named
    return [path]


def read_hub(hub: Mapping[str, Any], split: str, limit: int | None = None) -> Source:
    """The rows, or the first of them, of a data set of the hub, or of a folder that is laid out like one.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    streaming = bool(hub.get("streaming"))
    how = {"revision": hub["revision"]} if "revision" in hub else {}
    name = f"{hub['path']} ({hub[split]})"
    try:
        dataset = datasets.load_dataset(hub["path"], hub.get("name"), split=hub[split], streaming=streaming, **how)
        rows = iter(dataset)
        return Source(name, list(islice(rows, limit)), [(0, name)], _cut(rows, limit))
    except Exception as error:  # the hub's client has many errors of its own
        raise _unreachable(hub["path"], error) from None


def splits_of_hub(data: str) -> dict[str, Any]:
    """What ``NAME``, ``NAME:CONFIGURATION`` and ``NAME@REVISION`` say of a data set of the hub, with the names of its splits.

    Raises:
        InputError: it is not there, or cannot be reached.
    """
    import datasets

    named = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", data)
    if named is None:
        raise InputError(f"{data!r} names no data: give a file, a folder, or a data set as NAME:CONFIGURATION@REVISION")
    hub: dict[str, Any] = {"path": named[1]}
    hub |= {key: value for key, value in (("name", named[2]), ("revision", named[3])) if value is not None}
    try:
        splits = datasets.get_dataset_split_names(named[1], named[2], revision=named[3])
    except Exception as error:
        raise _unreachable(named[1], error, "there is no such file or folder either: ") from None
    return hub | split_names(splits)


def split_names(splits: list[str]) -> dict[str, str]:
    """Which of the splits that are there are to train on, to develop on and to test on."""
    if len(splits) == 1:
        return {"train": splits[0]}
    found = {"train": "train"} if "train" in splits else {}
    held = [name for name in ("validation", "valid", "val", "dev") if name in splits]
    if "test" in splits:
        return found | {"test": "test"} | ({"dev": held[0]} if held else {})
    return found | ({"test": held[0]} if held else {})


def _cut(rows: Iterator[Row], limit: int | None) -> tuple[str, ...]:
    """What to say if there are more rows than were read."""
    return (f"the first {limit:,} rows",) if limit is not None and next(rows, None) is not None else ()


def _unreachable(path: str, error: Exception, also: str = "") -> InputError:
    return InputError(
        f"data set {path} could not be loaded from the hub ({columnar.reason(error)}): {also}check the name and the network, or "
        "give a local copy with data_dir",
        "data_dir",
    )
