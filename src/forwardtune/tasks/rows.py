"""Data files as rows with named columns. Each kind of file has a reader; a name says which."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import columnar, json_rows, tables
from .text_file import COMPRESSED, not_utf8, suffix_of

Row = dict[str, Any]

# How a data file may end, the likeliest first, and what reads it.
_READERS: dict[str, Callable[[Path], tuple[Iterator[Row], str]]] = {
    ".jsonl": json_rows.read,
    ".csv": tables.read,
    ".json": json_rows.read,
    ".tsv": tables.read,
    ".ndjson": json_rows.read,
    ".parquet": columnar.read_parquet,
    ".arrow": columnar.read_arrow,
}
_TEXT = {".jsonl", ".json", ".ndjson", ".csv", ".tsv"}
#: How a data file may end, the likeliest first.
SUFFIXES = (*_READERS, *(suffix + end for suffix in _READERS if suffix in _TEXT for end in COMPRESSED))


@dataclass(frozen=True)
class FileRows:
    """The rows of one file, read as they are asked for, and a remark on how they were read, if that is worth a word."""

    path: Path
    rows: Iterator[Row]
    remark: str


def open_rows(path: Path) -> FileRows:
    """A data file, of which nothing but its beginning is read yet.

    - ``.jsonl``, ``.ndjson`` and ``.json`` hold an object a line, or one array of objects. NaN, as null, is None.
    - ``.csv`` and ``.tsv`` begin with a line of names; :mod:`.tables` finds out what separates the cells.
    - ``.parquet``, ``.arrow``, and a folder that ``datasets.Dataset.save_to_disk`` wrote. NaN is None.

    Text is UTF-8, or UTF-16 with its mark, and may be compressed (``.gz``, ``.bz2``, ``.xz``).

    Raises:
        InputError: a missing or malformed file, or one that names a column twice; from here or while rows are read.
    """
    with _Told(path):
        if path.is_dir() and columnar.is_saved(path):
            return FileRows(path, _told(path, columnar.read_saved(path)), "")
        read = _READERS.get(suffix_of(path))
        if read is None or (path.suffix.lower() in COMPRESSED and suffix_of(path) not in _TEXT):
            raise InputError(
                f"{path}: data files are JSON Lines (.jsonl) or CSV (.csv), a JSON array (.json), tab-separated (.tsv), "
                f".parquet or .arrow; text may be compressed ({', '.join(COMPRESSED)})"
            )
        rows, remark = read(path)
        return FileRows(path, _told(path, rows), remark)


def read_rows(path: Path) -> list[Row]:
    """All rows of a data file (:func:`open_rows`)."""
    return list(open_rows(path).rows)


def _told(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    with _Told(path):
        yield from rows


class _Told:
    """Inside, what goes wrong with a file is said of it in one message."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        path = self._path
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{path}: there is no such data file") from None
        if isinstance(error, UnicodeDecodeError):
            raise not_utf8(path) from None
        if isinstance(error, EOFError | zlib.error):
            raise InputError(f"{path} ends in the middle: it was not compressed or copied to its end") from None
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
