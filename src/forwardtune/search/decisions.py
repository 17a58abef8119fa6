"""L0: what a search decides (:class:`~forwardtune.search.rates.RateSearch`); others act on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hold:
    """Estimate so many steps at the present weights, without taking them."""

    steps: int


@dataclass(frozen=True)
class Try:
    """Measure the held-out loss where the held steps would lead with this rate; at rate 0, that of the present weights.

    The loss is wanted back by ``tried``; infinite if a step does not fit float32.
    """

    lr: float


@dataclass(frozen=True)
class Take:
    """Take the steps that are held, with this rate."""

    lr: float


@dataclass(frozen=True)
class Measure:
    """Measure the held-out loss of the present weights. It is wanted back by ``measured``."""


@dataclass(frozen=True)
class SetRate:
    """Go on with this learning rate; a schedule goes on from it."""

    lr: float


@dataclass(frozen=True)
class GoBack:
    """Go on from the weights after ``step`` steps, with this learning rate.

    Attributes:
        why: ``"diverged"`` or ``"worse"``.
    """

    step: int
    lr: float
    why: str


@dataclass(frozen=True)
class Note:
    """Keep this beside the steps: what was decided, and what it was based on."""

    content: dict[str, Any]


@dataclass(frozen=True)
class Announce:
    """Tell people."""

    text: str


Decision = Hold | Try | Take | Measure | SetRate | GoBack | Note | Announce
