"""Steps of an optimizer on closures that follow a script."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


def trusted(optimizer: Any) -> Any:
    """The optimizer without its first step's self-check, for closures that count their calls or follow a script."""
    optimizer.evaluator._checked = {True, False}
    return optimizer


def scripted(*losses: Any) -> Callable[[], Any]:
    """A closure that returns these values in turn, for ever."""
    values = itertools.cycle(losses)
    return lambda: next(values)


def train(optimizer: Any, *closures: Callable[[], Any]) -> None:
    """A step on each closure."""
    for closure in closures:
        optimizer.step(closure)
