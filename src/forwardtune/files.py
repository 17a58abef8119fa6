"""Small JSON files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
