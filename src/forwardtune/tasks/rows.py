"""Data files: JSON Lines, JSON arrays, CSV and tab-separated values, as rows with named columns."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError

Row = dict[str, Any]

#: How a data file may end, the likeliest first.
SUFFIXES = (".jsonl", ".csv", ".json", ".tsv")
# What cells may be separated by, the likeliest first. The first line decides.
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
# Kinds of the parts of a message that are no text.
_MEDIA = {"image", "image_url", "input_image", "video", "audio", "input_audio"}
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_rows(path: Path) -> list[Row]:
    """The rows of a data file.

    - ``.jsonl`` and ``.json`` hold an object a line, or one array of objects. NaN, as null, is None.
    - ``.csv`` and ``.tsv`` begin with a line of names. Cells are separated by commas, in ``.tsv`` by tabs; where the
      first line has none, by semicolons, tabs or bars. Where each line of a tab-separated file has as many cells as the
      first, each is a row, and a quotation mark is one unless a pair of them encloses the cell.

    Raises:
        InputError: a missing or malformed file, or one that names a column twice.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: data files are JSON Lines (.jsonl) or CSV (.csv), a JSON array (.json) or tab-separated (.tsv)"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _table(path, file, _DELIMITERS[suffix]) if suffix in _DELIMITERS else _json(path, file)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such data file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, for example with iconv -t utf-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def require_text(rows: Iterable[Row], source: str) -> None:
    """Raise InputError if a row holds an image or a sound, as data sets of the hub, or messages, do: models are tuned on text here."""
    for number, row in enumerate(rows, start=1):
        for column, value in row.items():
            if _holds_media(value):
                raise InputError(
                    f"{source}, example {number}: column {column!r} holds an image or other media, and only text is tuned on and "
                    "measured here, vision-language models included: use data without that column"
                )


def _holds_media(value: Any) -> bool:
    """Whether it is, or contains, what ``datasets`` gives for an image or a sound, or a part of a message that is one."""
    if isinstance(value, Mapping):
        media = (
            value.get("type") in _MEDIA
            or {"bytes", "path"} == value.keys()
            or {"array", "sampling_rate"} <= value.keys()
        )
        return media or any(map(_holds_media, value.values()))
    if isinstance(value, list):
        return any(map(_holds_media, value))
    return isinstance(value, bytes) or type(value).__module__.partition(".")[0] == "PIL"


def _json(path: Path, file: TextIO) -> list[Row]:
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if first.lstrip().startswith("["):
        array = _decode(file.read(), f"{path} begins like a JSON array and is none", "one array of objects is expected")
        entries = ((f"entry {number}", entry) for number, entry in enumerate(array, start=1))
    else:
        expected = "one object a line is expected, or one array of objects"
        entries = (
            (f"line {number}", _decode(line, f"{path}, line {number} is not JSON", expected))
            for number, line in enumerate(file, start=1)
            if line.strip()
        )
    rows = []
    for where, row in entries:
        if not isinstance(row, dict):
            raise InputError(f"{path}, {where} is not a JSON object with named columns")
        rows.append(row)
    return rows


def _decode(text: str, wrong: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}" if error.lineno > 1 else error.msg
        raise InputError(f"{wrong} ({where}): {expected}") from None
    except ValueError as error:
        raise InputError(f"{wrong.removesuffix(' is not JSON')}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    if twice := _twice(name for name, _ in pairs):  # the last one would win
        raise ValueError(twice)
    return dict(pairs)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))


def _table(path: Path, file: TextIO, delimiters: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 128 KiB
    lines = file.readlines()
    first = next(filter(_is_filled, lines), "")
    delimiter = next((one for one in delimiters if len(next(csv.reader([first], delimiter=one))) > 1), delimiters[0])
    tabs = {line.count("\t") for line in lines if _is_filled(line)}
    plain = delimiter == "\t" and len(tabs) == 1
    cells = _plain_cells(lines) if plain else _quoted_cells(path, lines, delimiter)
    _, names = next(cells, (0, []))
    names = [name.strip() for name in names]
    if twice := _twice(filter(None, names)):
        raise InputError(f"{path}: {twice}")
    rows = []
    for number, row in cells:
        if len(row) != len(names):
            raise InputError(
                f"{path}, line {number} has not as many cells as the first line has names ({len(row)}, not {len(names)}): "
                f"quote cells that hold {_NAMES[delimiter]}"
            )
        rows.append(dict(zip(names, row, strict=True)))
    return rows


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
    """What to say of a name that is there twice; nothing if there is none."""
    name = next((name for name, count in Counter(names).items() if count > 1), None)
    return "" if name is None else f"{name!r} is the name of two columns: rename or remove one"
