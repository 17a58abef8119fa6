"""Data that a user names beside a task: a file, a folder, a pattern or a data set of the hub, in place of the task's own."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from . import columnar
from .rows import SUFFIXES
from .sources import STREAMED, Source, read_files, read_hub, split_names, splits_of_hub
from .task import Task
from .text_file import suffix_of


def with_data(task: Task, data: str, *, streaming: bool = False) -> Task:
    """The task, with examples from elsewhere.

    Args:
        data: a data file; a pattern such as ``part-*.jsonl``; a folder; or a data set of the hub, as ``NAME``,
            ``NAME:CONFIGURATION`` or ``NAME@REVISION``. What is named ``train``, ``validation`` and ``test`` in a folder or
            data set is for that. Where nothing is for tests, test examples are set aside from the others.
        streaming: read the first rows alone (:data:`.sources.STREAMED`).

    Raises:
        InputError: there is nothing of that name.
    """
    path = Path(data).expanduser()
    if path.exists() or glob.has_magic(data):
        files = _in_folder(path) if path.is_dir() else {"train": path}
        found: dict[str, Any] = {"files": files, "hub": None}
    elif path.suffix or data.count("/") > 1 or data.startswith((".", "~", "/")):
        near = [other.name for other in path.parent.glob("*") if suffix_of(other) in SUFFIXES]
        raise InputError(f"{data}: there is no such data file{nearest(path.name, near)}")
    else:
        found = {"files": {}, "hub": splits_of_hub(data)}
    task = replace(task, **found, streaming=streaming)
    splits = task.hub or task.files
    if "train" not in splits:
        raise InputError(f"{data} has no training data: name the file or the split that has them 'train'")
    return replace(task, holds_out="test" not in splits)


def open_split(task: Task, split: str, rows: int | None = None) -> Source:
    """A split's rows, or the first of them, from the task's own source.

    Raises:
        InputError: the task has no such split, or it cannot be read.
    """
    rows = STREAMED if rows is None and task.streaming else rows
    if task.hub is not None:
        return read_hub({**task.hub, "streaming": task.streaming}, split, rows)
    if split not in task.files:
        raise InputError(
            f"task {task.name} has no {split} file: add '{split}: FILE' to its task file, or give all of its data",
            "data",
        )
    return read_files(task.files[split], rows)


def columns_of_data(task: Task) -> tuple[list[str], str]:
    """The columns of the training data, and where they come from. Raises InputError: there are no data, or no row."""
    if not task.files and task.hub is None:
        raise InputError(
            f"task {task.name} has no examples of its own: name a file, a folder or a set of the hub with data='FILE'",
            "data",
        )
    source = open_split(task, "train", rows=1)
    if not source.rows:
        raise InputError(f"{source.name} holds no example")
    return list(source.rows[0]), source.name


def _in_folder(folder: Path) -> dict[str, Path]:
    """The files or folders of each split; the folder itself for training if their names do not say it."""
    if columnar.is_saved(folder):
        return {"train": folder}
    by_name: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.lower().endswith(SUFFIXES):
            by_name.setdefault(path.name.split(".")[0].lower(), path)
    named = split_names(list(by_name)) if "train" in by_name else {}
    return {split: by_name[name] for split, name in named.items()} or {"train": folder}
