"""What the terminal shows during a run, and how Ctrl-C ends one."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from ..trainer import MeZOTrainer
from . import say

# The loss of a minibatch jumps about: the bar shows the mean of so many.
_WINDOW = 20


class Watcher(TrainerCallback):
    """Moves the progress bar, with the recent mean loss, and stops after the step in which Ctrl-C came."""

    def __init__(self, trainer: MeZOTrainer, progress: Any, interrupted: list[bool]) -> None:
        self._trainer = trainer
        self._progress = progress
        self._interrupted = interrupted
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._skipped = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = self._trainer.mezo.last
        if record is not None and not record.skipped:
            self._losses.append(record.loss)
        elif record is not None:
            self._skipped += 1
        mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._progress.set_postfix_str(
            f"loss {mean:.4f}" + (f", {self._skipped} skipped" if self._skipped else ""), refresh=False
        )
        self._progress.update(1)
        if self._interrupted:
            control.should_training_stop = control.should_save = True


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Inside, the first Ctrl-C makes the list that is yielded non-empty; the second interrupts at once."""
    interrupted: list[bool] = []

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        say("\nstopping after this step; Ctrl-C again to stop at once (the step log stays intact)")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
