"""YAML files that people write: what is wrong in them is said with its line and its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


def read_yaml(path: Path, what: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file. ``what`` it is and keys that it ``holds`` are for messages.

    Raises:
        InputError: the file cannot be read, is not YAML, names a key twice, or holds something other than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, TypeError) as error:
        raise InputError(f"{path} is not valid YAML: {_reason(error, text)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys such as {holds}")
    return content


class _Loader(yaml.SafeLoader):
    """A key given twice is an error: YAML would let the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and (key.tag, str(key.value)) in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key.value!r} is there twice: rename or remove one")
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _reason(error: Exception, text: str) -> str:
    """What is wrong where, in one line. Text without quotes, such as ``prompt: Review: {text}``, is the usual reason."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    lines = text.splitlines()
    line = lines[mark.line].strip() if mark.line < len(lines) else ""
    return (
        f"line {mark.line + 1}, {line!r:.80}: {getattr(error, 'problem', error)}. Put text in quotes that holds ': ' or "
        "begins with one of { [ & * ! % @"
    )
