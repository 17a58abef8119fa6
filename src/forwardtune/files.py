"""Small JSON files that are whole or not there, and digests of any."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any


def plain(x: float) -> float | str:
    """JSON has no infinity and no NaN: they are written as strings that ``float`` reads."""
    return x if math.isfinite(x) else str(x)


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if it is missing or damaged, as then it is made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any], *, indent: int | None = 2) -> None:
    """Write the file whole, or leave what was there."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write the file whole, or leave what was there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def digest_of(*paths: Path) -> str:
    """SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
