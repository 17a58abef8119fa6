"""Step logs on the disk: read, forged, and on a disk that is full."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forwardtune.trajectory.format import seal


def json_lines(path: Path) -> list[dict[str, Any]]:
    """What each line of a file says."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_lines(path: Path) -> list[dict[str, Any]]:
    """A log without its times, and so without its checksums. A folder stands for its steps.jsonl."""
    lines = json_lines(path / "steps.jsonl" if path.is_dir() else path)
    return [{key: value for key, value in line.items() if key not in ("seconds", "check")} for line in lines]


def reseal(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrite a log's lines and give them good checksums: what an accident cannot do, another program can."""
    contents = json_lines(path)
    for content in contents:
        del content["check"]
    change(contents)
    check, lines = "", []
    for content in contents:
        line, check = seal(check, content)
        lines.append(line + "\n")
    path.write_text("".join(lines))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes: a full disk, as the kernel reports it."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
