"""The files of a run: ``metrics.json`` and its companions, written whole or not at all."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from ..run_folder import OUTCOMES
from . import say


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole, or leave what was there."""
    files.write_json(path, plain(content), indent=None if path.name == OUTCOMES else 2)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines whole, or leave what was there."""
    files.write_text(path, _text_of(lines))


def add_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines behind what is in the file."""
    if text := _text_of(lines):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


def _text_of(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(plain(line), ensure_ascii=False) + "\n" for line in lines)


def plain(value: Any) -> Any:
    """The value with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: plain(content) for key, content in value.items()}
    if isinstance(value, list):
        return [plain(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_folder(name: str | Path, leftovers: tuple[str, ...] = (), resumable: bool = False) -> Path:
    """The path of a folder that does not exist yet, or holds nothing but files that begin like ``leftovers``.

    Raises:
        InputError: it holds something.
    """
    folder = Path(name)
    if resumable and (folder / "steps.jsonl").exists():
        raise InputError(
            f"{folder} holds another run: add --resume to go on with it, --overwrite to move it aside, or choose another "
            "--output-dir (nothing was overwritten)"
        )
    if folder.is_file() or (folder.is_dir() and not all(path.name.startswith(leftovers) for path in folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose another --output-dir (nothing was overwritten)")
    return folder


def move_aside(folder: Path) -> Path | None:
    """Give a folder that holds something the first free name beside it, ``NAME.1`` and on. None if there was nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def resume_command(folder: Path, objective: str) -> str:
    """The command that goes on with a run. Rewards are named in it, as a log's word is not enough to import them."""
    named = f" --objective {shlex.quote(objective)}" if ":" in objective else ""
    return f"forwardtune train --output-dir {shlex.quote(str(folder))} --resume{named}"


def table(columns: dict[str, dict[str, float]]) -> None:
    """Show measurements side by side: one column for each, one row for each quantity."""
    first = next(iter(columns.values()))
    heading = f"{first['examples']:.0f} test examples"
    say(f"{heading:24}" + "".join(f"{name:>12}" for name in columns))
    for name in first:
        if name != "examples":  # what plain() wrote as null is NaN again
            values = [math.nan if column[name] is None else column[name] for column in columns.values()]
            say(f"{name:24}" + "".join(f"{value:12.4f}" for value in values))


def peak_memory(metrics: dict[str, Any]) -> str:
    """How much memory a run took at most, beside what inference takes."""
    tuning, inference = (metrics[f"{what}peak_memory_bytes"] / 2**20 for what in ("", "inference_"))
    return f"{tuning:,.0f} MiB; inference on the same batch size {inference:,.0f} MiB"
