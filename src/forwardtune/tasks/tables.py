"""Comma-separated values and their kin: what separates the cells, and where quotation marks enclose them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError
from .columns import twice
from .text_file import open_text, suffix_of

Row = dict[str, Any]

# What cells may be separated by, the likeliest first; then any other character that a name would hardly have.
_LIKELY = {".csv": ",;\t|", ".tsv": "\t,;|"}
_NEVER = "\"' _.-\r\n"
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# So many records show what separates cells.
_SAMPLE = 50


def read(path: Path) -> tuple[Iterator[Row], str]:
    """The rows of a file that begins with a line of names, and what separates the cells where its name does not say it.

    That is the first of commas (``.tsv``: tabs), semicolons, tabs, bars and other marks that part the first records into as
    many cells each; if none does, the first that parts the first line. Where each line of a tab-separated file has as many
    cells as the first, each is a row, and a quotation mark is one unless a pair of them encloses the cell.

    Raises:
        InputError: a line with more or fewer cells than there are names, or a name that is there twice.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 128 KiB
    likely = _LIKELY[suffix_of(path)]
    with open_text(path) as file:
        lines = file.readlines()
    delimiter = _delimiter(list(islice(filter(_is_filled, lines), _SAMPLE)), likely)
    tabs = {line.count("\t") for line in lines if _is_filled(line)}
    plain = delimiter == "\t" and len(tabs) == 1
    cells = _plain_cells(lines) if plain else _quoted_cells(path, lines, delimiter)
    said = name_of(delimiter)
    _, names = next(cells, (0, []))
    names = [name.strip() for name in names]
    if wrong := twice(filter(None, names)):
        raise InputError(f"{path}: {wrong}")
    return _named(path, names, cells, said), "" if delimiter == likely[0] else f"cells separated by {said}"


def name_of(delimiter: str) -> str:
    """What separates the cells, in words."""
    return _NAMES.get(delimiter, repr(delimiter))


def _delimiter(sample: Sequence[str], likely: str) -> str:
    if not sample:
        return likely[0]
    first = sample[0]
    others = [one for one in dict.fromkeys(first) if not one.isalnum() and one not in likely + _NEVER]
    for delimiter in (*likely, *(others if len(sample) > 1 else ())):
        counts = {len(record) for record in _records(sample, delimiter)}
        if len(counts) == 1 and counts.pop() > 1:
            return delimiter
    return next((one for one in likely if len(next(csv.reader([first], delimiter=one))) > 1), likely[0])


def _records(sample: Sequence[str], delimiter: str) -> list[list[str]]:
    """The sample's records. The last may be cut off within quotation marks; it counts only if it is alone."""
    try:
        records = [record for record in csv.reader(sample, delimiter=delimiter) if record]
    except csv.Error:
        return []
    return records[:-1] if len(sample) == _SAMPLE and len(records) > 1 else records


def _named(path: Path, names: list[str], cells: Iterator[tuple[int, list[str]]], said: str) -> Iterator[Row]:
    for number, row in cells:
        if len(row) != len(names):
            raise InputError(
                f"{path}, line {number} has not as many cells as the first line has names ({len(row)}, not {len(names)}): "
                f"quote cells that hold {said}"
            )
        yield dict(zip(names, row, strict=True))


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
