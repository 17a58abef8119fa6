"""Rewards for answers in JSON, in the signature that TRL uses: lists in, a list of numbers out."""

from __future__ import annotations

import json
from typing import Any


def valid_json(completions: list[str], **columns: Any) -> list[float]:
    """1 for an object with name and age alone; parts of it earn a part, so that there is something to climb."""
    return [_worth(completion) for completion in completions]


def true_facts(completions: list[str], name: list[str], age: list[int], **columns: Any) -> list[float]:
    """The share of name and age that the answer has right."""
    return [((n in c) + (str(a) in c)) / 2 for c, n, a in zip(completions, name, age, strict=True)]


def _worth(completion: str) -> float:
    try:
        content = json.loads(completion)
    except json.JSONDecodeError:
        signs = [completion.startswith("{"), completion.endswith("}"), '"name":' in completion, '"age":' in completion]
        return 0.1 * sum(signs)
    if not isinstance(content, dict):
        return 0.1
    return 1.0 if set(content) == {"name", "age"} else 0.5
