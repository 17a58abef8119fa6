"""JSON Lines and JSON arrays as rows, each object with names that are there once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .columns import twice
from .text_file import open_text

Row = dict[str, Any]


def read(path: Path) -> tuple[Iterator[Row], str]:
    """The objects of a file that holds one a line, or one array of them. NaN, as null, is None.

    Raises:
        InputError: what is neither, at the line or entry that it names; or a name that an object has twice.
    """
    return _objects(path), ""


def _objects(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            array = _decode(
                file.read(), f"{path} begins like a JSON array and is none", "one array of objects is expected"
            )
            entries = ((f"entry {number}", entry) for number, entry in enumerate(array, start=1))
        else:
            expected = "one object a line is expected, or one array of objects"
            entries = (
                (f"line {number}", _decode(line, f"{path}, line {number} is not JSON", expected))
                for number, line in enumerate(file, start=1)
                if line.strip()
            )
        for where, row in entries:
            if not isinstance(row, dict):
                raise InputError(f"{path}, {where} is not a JSON object with named columns")
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
    if said := twice(name for name, _ in pairs):  # the last one would win
        raise ValueError(said)
    return dict(pairs)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))
