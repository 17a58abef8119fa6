"""``forwardtune eval``: the task's metric and loss of a model, untuned or tuned."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .session import MODEL_DEFAULTS, fill, open_session


def add_commands(commands: Any) -> None:
    """Add ``eval`` to the command line."""
    from . import add_model_options

    parser = commands.add_parser("eval", help="measure a model on a task's held-out examples; prints one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print one JSON object on stdout."""
    fill(options, MODEL_DEFAULTS)
    session = open_session(options, "test")
    result = session.evaluate("evaluating")
    print(json.dumps({"model": options.model, "task": session.task.name, **result}))
