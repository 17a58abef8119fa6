"""Data files: JSON Lines, JSON arrays, CSV and tab-separated values, as rows with named columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError

Row = dict[str, Any]

# What cells may be separated by, the likeliest first. The first line decides.
_CSV_DELIMITERS = (",", ";", "\t", "|")
_TSV_DELIMITERS = ("\t", ",", ";", "|")


def read_rows(path: Path) -> list[Row]:
    """The rows of a data file.

    - ``.jsonl`` and ``.json`` hold an object a line, or one array of objects. NaN, as null, is None.
    - ``.csv`` and ``.tsv`` begin with a line of names. Cells are separated by commas, in ``.tsv`` by tabs; where the
      first line has none, by semicolons, tabs or bars. Where each line of a tab-separated file has as many cells as the
      first, each is a row, and a quotation mark is one unless a pair of them encloses the cell.

    Raises:
        InputError: a missing or malformed file, or one that names a column twice.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: data files are JSON Lines (.jsonl) or CSV (.csv), a JSON array (.json) or tab-separated (.tsv)"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return reader(path, file)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such data file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, for example with iconv -t utf-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _json(path: Path, file: TextIO) -> list[Row]:
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    return list(_json_array(path, file.read()) if first.lstrip().startswith("[") else _json_lines(path, file))


def _json_array(path: Path, text: str) -> Iterator[Row]:
    entries = _decode(text, f"{path} begins like a JSON array and is none", "one array of objects is expected")
    for number, row in enumerate(entries, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, entry {number} is not a JSON object with named columns")
        yield row


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _decode(
            line, f"{path}, line {number} is not JSON", "one object a line is expected, or one array of objects"
        )
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object with named columns")
        yield row


def _decode(text: str, wrong: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}" if error.lineno > 1 else error.msg
        raise InputError(f"{wrong} ({where}): {expected}") from None
    except ValueError as error:
        raise InputError(f"{wrong.removesuffix(' is not JSON')}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):  # the last one would win
        raise ValueError(_twice(name for name, _ in pairs))
    return row


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))


def _comma_separated(path: Path, file: TextIO) -> list[Row]:
    return _table(path, file, _CSV_DELIMITERS)


def _tab_separated(path: Path, file: TextIO) -> list[Row]:
    return _table(path, file, _TSV_DELIMITERS)


_READERS: dict[str, Callable[[Path, TextIO], list[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
}

#: How a data file may end, the likeliest first.
SUFFIXES = (".jsonl", ".csv", ".json", ".tsv")


def _table(path: Path, file: TextIO, delimiters: tuple[str, ...]) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 128 KiB
    lines = file.readlines()
    first = next(filter(_is_filled, lines), "")
    delimiter = next((one for one in delimiters if len(next(csv.reader([first], delimiter=one))) > 1), delimiters[0])
    tabs = {line.count("\t") for line in lines if _is_filled(line)}
    if delimiter == "\t" and len(tabs) == 1:
        cells = _plain_cells(lines)
    else:
        cells = _quoted_cells(path, lines, delimiter)
    _, names = next(cells, (0, []))
    names = [name.strip() for name in names]
    if len(set(names) - {""}) < len(names) - names.count(""):
        raise InputError(f"{path}: {_twice(filter(None, names))}")
    rows = []
    for number, row in cells:
        if len(row) != len(names):
            raise InputError(
                f"{path}, line {number} has not as many cells as the first line has names ({len(row)}, not {len(names)}): "
                f"quote cells that hold {_NAMES[delimiter]}"
            )
        rows.append(dict(zip(names, row, strict=True)))
    return rows


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def _quoted_cells(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells, by the rules of CSV: a quoted cell may hold everything."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _plain_cells(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of tab-separated lines, in which a lone quotation mark encloses nothing."""
    for number, line in enumerate(lines, start=1):
        if _is_filled(line):
            yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _is_filled(line: str) -> bool:
    return line.rstrip("\r\n") != ""  # tabs alone are cells


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    encloses = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if encloses else cell


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    name = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return f"{name!r} is the name of two columns: rename or remove one"
