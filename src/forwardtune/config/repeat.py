"""The command that does a run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .description import with_defaults
from .option import options
from .runs import Train


def repeat_command(recorded: Mapping[str, Any]) -> str:
    """The command line of a run with the recorded settings, its method among them; what is that method's default is left out.

    The steps that a time budget came to are named in its place.
    """
    declared = options(Train)
    method = str(recorded.get("method", "mezo"))  # in runs of old there was no other
    usual = with_defaults("train", {"method": method})
    words = ["forwardtune", "train", "--method", method]
    for name, one in declared.items():
        value = recorded.get(name)
        if value is None or value is False or value == getattr(usual, name):
            continue
        if name == "time_budget" and recorded.get("steps") is not None:
            continue
        text = f"{value}s" if name == "time_budget" else f"{value:g}" if isinstance(value, float) else str(value)
        words += [f"--{one.key}"] if value is True else [f"--{one.key}", text]
    return shlex.join([*words, "--output-dir", "DIR"])
