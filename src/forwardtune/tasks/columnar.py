"""Parquet and Arrow files, which pyarrow reads, and folders that ``datasets`` saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .columns import twice

Row = dict[str, Any]


def read_parquet(path: Path) -> tuple[Iterator[Row], str]:
    """The rows of a Parquet file, a batch at a time. Raises InputError for a damaged one, or a name that is there twice."""
    import pyarrow.parquet

    with path.open("rb"):  # says what pyarrow would say otherwise
        pass
    file = _opened(path, "Parquet", pyarrow.parquet.ParquetFile, path)
    _require_once(path, file.schema_arrow.names)
    return _rows(file.iter_batches()), ""


def read_arrow(path: Path) -> tuple[Iterator[Row], str]:
    """As :func:`read_parquet`, for a file of Arrow, as a stream or with an index at its end."""
    import pyarrow

    with path.open("rb") as beginning:
        is_file = beginning.read(6) == b"ARROW1"
    source = pyarrow.memory_map(str(path))
    if is_file:
        reader = _opened(path, "Arrow", pyarrow.ipc.open_file, source)
        batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = reader = _opened(path, "Arrow", pyarrow.ipc.open_stream, source)
    _require_once(path, reader.schema.names)
    return _rows(batches), ""


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.Dataset.save_to_disk`` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_saved(folder: Path) -> Iterator[Row]:
    """The rows of such a folder."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library has many errors of its own
        raise InputError(f"{folder} cannot be read as a saved data set: {reason(error)}") from None
    return map(_plain, dataset)


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _opened(path: Path, kind: str, read: Any, source: Any) -> Any:
    import pyarrow

    try:
        return read(source)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is not a whole {kind} file: {reason(error)}") from None


def _rows(batches: Iterable[Any]) -> Iterator[Row]:
    for batch in batches:
        yield from map(_plain, batch.to_pylist())


def _plain(row: Row) -> Row:
    """NaN is how a data frame writes a gap."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _require_once(path: Path, names: list[str]) -> None:
    if said := twice(names):
        raise InputError(f"{path}: {said}")
