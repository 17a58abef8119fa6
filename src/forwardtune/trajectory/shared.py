"""The logs of several workers: each keeps one, and whoever has lost his, or a few steps of it, gets the longest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LogError
from ..workers import Alone
from .format import ABSENT
from .reader import Log, read_log

# What a header says of the moment at which it was written.
_OF_THE_LAUNCH = ("versions", "workers", "run", "format")


def any_has_log(path: Path, workers: Alone) -> bool:
    """Whether one of the workers has a log, each at its own path."""
    return workers.any(path.exists())


def share_log(path: Path, workers: Alone, companions: Sequence[str] = ()) -> None:
    """Give every worker the longest log, at its own path, and files that lie beside it there.

    Raises:
        LogError: no worker has a log, one is damaged, or they are of different runs.
    """
    if workers.count == 1:
        return
    try:
        own = read_log(path) if path.exists() else None
    except LogError as error:
        workers.tell(error)
        raise
    steps = workers.all(None if own is None else own.steps)
    known = [number for number in steps if number is not None]
    if not known:
        raise LogError(f"{path}: there is no such file, and no other rank has a log of this run")
    source = steps.index(max(known))
    summaries = workers.all(None if own is None else _summary(own, min(known)))
    odd = [rank for rank, summary in enumerate(summaries) if summary not in (None, summaries[source])]
    if odd:
        raise LogError(
            f"{path}: the logs of rank {odd[0]} and rank {source} are of different runs, or of steps that were taken otherwise: move the one "
            "that does not belong to this run away"
        )
    for name in (path.name, *companions):
        _give(path.with_name(name), own if name == path.name else None, source, workers)


def _give(path: Path, log: Log | None, source: int, workers: Alone) -> None:
    """One file of a rank, for all: written whole, where it is not there already."""

    def read() -> bytes:
        data = path.read_bytes() if path.exists() else b""
        return data if log is None else data[: log.length]

    mine = hashlib.blake2b(read(), digest_size=8).hexdigest()
    if len(set(workers.all(mine))) == 1:
        return
    content = workers.bytes_of(source, read)
    if workers.rank != source and content:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)


def _summary(log: Log, steps: int) -> str:
    """Of what the logs of one run have in common up to a step: all but times."""
    header: dict[str, Any] = {key: log.header.get(key, ABSENT.get(key)) for key in sorted({*log.header, *ABSENT})}
    content = [{key: value for key, value in header.items() if key not in _OF_THE_LAUNCH}]
    records = [(record.step, record.lr, record.coefficients, record.losses) for record in log.records[:steps]]
    return hashlib.blake2b(repr((content, records)).encode(), digest_size=8).hexdigest()
