"""What goes on beside the steps: the progress bar, Ctrl-C, the clock, and the development set."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from ..objectives import TaskObjective
from . import say
from .results import add_lines, read_lines, write_lines

# The loss of a minibatch jumps about: the bar shows the mean of so many.
_WINDOW = 20
# After so many steps one sees whether an objective moves anything.
_EARLY = 25


class Watcher(TrainerCallback):
    """Moves the progress bar, with the recent mean loss, and stops after the step in which Ctrl-C came.

    Args:
        progress: the bar.
        interrupted: not empty once Ctrl-C came.
        loss: the loss of the last step; NaN if the step was skipped.
        held: whether steps are held back, so that none could be stopped after.
        save: whether to save a checkpoint then.
        raised: the objective is no plain loss but something to be raised: the bar shows it so, as minus the loss.
        still: whether the last step moved nothing.
        advise: called with the numbers of such steps and of all, once, if they are many early in the run.
    """

    def __init__(
        self,
        progress: Any,
        interrupted: list[bool],
        loss: Callable[[], float],
        held: Callable[[], bool],
        save: bool,
        *,
        raised: bool = False,
        still: Callable[[], bool] = lambda: False,
        advise: Callable[[int, int], object] = lambda still, steps: None,
    ) -> None:
        self._save, self._held = save, held
        self._raised, self._last_still, self._advise = raised, still, advise
        self._still = self._steps = 0
        self._progress = progress
        self._interrupted = interrupted
        self._loss = loss
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._skipped = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self._loss()
        if math.isnan(loss):
            self._skipped += 1
        else:
            self._recent.append(loss)
        mean = sum(self._recent) / len(self._recent) if self._recent else math.nan
        self._steps += 1
        self._still += self._last_still()
        shown = f"objective {-mean:.4f}" if self._raised else f"loss {mean:.4f}"
        shown += f", {self._skipped} skipped" if self._skipped else ""
        self._progress.set_postfix_str(shown + (f", {self._still} moved nothing" if self._still else ""), refresh=False)
        self._progress.update(1)
        if self._steps == _EARLY and state.global_step < state.max_steps:
            self._advise(self._still, self._steps)
        if self._interrupted and not self._held():
            control.should_training_stop = True
            control.should_save = self._save


class StepClock(TrainerCallback):
    """The loss and the seconds of every step, for methods that keep no step log."""

    def __init__(self, loss: Callable[[], float]) -> None:
        self._loss = loss
        self._began = 0.0
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((self._loss(), time.perf_counter() - self._began))


class Deadline(TrainerCallback):
    """Stops a run whose time is over.

    Args:
        until: by ``time.monotonic``; None: never.
        may_stop: whether a run can be stopped after this step.
    """

    def __init__(self, until: float | None, may_stop: Callable[[], bool]) -> None:
        self._until, self._may_stop = until, may_stop
        self.is_over = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._until is None or time.monotonic() < self._until or not self._may_stop():
            return
        if state.global_step < state.max_steps:
            self.is_over = True
            say(f"the time is over after step {state.global_step} of {state.max_steps}")
        control.should_training_stop = True


class DevWatcher(TrainerCallback):
    """Measures the development split every so many steps and at the end, and remembers which step was best.

    Args:
        evaluate: measures it.
        metric: what to compare by, ``loss`` or something that should rise, for which the loss decides between equals.
        every: steps between measurements; None measures at the end alone.
        file: where the measurements are kept, so that a resumed run knows them.
        improved: called with the model when a step is better than all before it.
        heard: called with every step and what was measured after it.
        patience: stop after so many measurements in a row that were not better than the best one before; None: never.
        untuned: measure before the first step too, as step 0.
        held: whether steps are held back: the weights are still untuned then, and are not measured.
        is_over: whether the run ends after this step for good, though it is not the last one.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        metric: str,
        every: int | None,
        file: Path,
        improved: Callable[[Any], object] | None = None,
        *,
        heard: Callable[[int, dict[str, float]], object] | None = None,
        patience: int | None = None,
        untuned: bool = False,
        held: Callable[[], bool] = lambda: False,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._untuned, self._held, self._is_over = untuned, held, is_over
        self._evaluate, self._metric, self._every, self._file, self._improved = evaluate, metric, every, file, improved
        self._heard, self._patience = heard, patience
        #: Whether patience ended the run.
        self.gave_up = False
        self.lines = read_lines(file)

    @property
    def best(self) -> dict[str, Any] | None:
        """``{"step": ..., "dev": ...}`` of the best measurement; the earliest of several; None before the first."""
        return max(self.lines, key=self._worth, default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # A resumed run may do its last steps again.
        self.lines = [line for line in self.lines if line["step"] <= state.global_step]
        if state.global_step:  # a kill may have come between a step and its measurement
            self.on_step_end(args, state, control, model)
        elif self._untuned:
            self.measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps or self._is_over()
        if last or (self._every is not None and state.global_step % self._every == 0 and not self._held()):
            self.measure(state.global_step, model)
            if self._patience is not None and not last and self._in_vain() >= self._patience:
                say(f"{self._in_vain()} measurements without improvement: stopping after step {state.global_step}")
                self.gave_up = control.should_training_stop = True

    def _in_vain(self) -> int:
        """How many measurements came after the best one."""
        best = self.best
        return sum(line["step"] > best["step"] for line in self.lines) if best else 0

    def measure(self, step: int, model: Any) -> None:
        """Measure after a step, unless that was done."""
        if any(line["step"] == step for line in self.lines):
            return
        training = model.training
        before = self.best
        dev = self._evaluate()
        model.train(training)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in dev.items() if name != "examples")
        say(f"step {step}: dev {shown}")
        if self._heard is not None:  # before it is written: a resumed run measures again what was not heard
            self._heard(step, dev)
        self.lines.append({"step": step, "dev": dev})
        write_lines(self._file, self.lines)
        if self._improved is not None and self.best is not before:
            self._improved(model)

    def _worth(self, line: dict[str, Any]) -> tuple[float, float]:
        loss = line["dev"].get("loss")
        fallen = -loss if loss is not None and math.isfinite(loss) else -math.inf
        return (fallen, 0.0) if self._metric == "loss" else (line["dev"][self._metric], fallen)


def keep_tuned(path: Path) -> Callable[[Any], None]:
    """A function that keeps the tuned weights of a model in a file."""

    def keep(model: Any) -> None:
        torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, path)

    return keep


class Course(TrainerCallback):
    """Mean and spread of the objective's terms in every step, kept in a file as they come."""

    def __init__(self, objective: TaskObjective, file: Path) -> None:
        self._objective, self._file = objective, file
        self.lines = read_lines(file)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines = [line for line in self.lines if line["step"] <= state.global_step]
        write_lines(self._file, self.lines)
        self._objective.take_statistics()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = {"step": state.global_step, "objective": self._objective.take_statistics()}
        self.lines.append(line)
        add_lines(self._file, [line])


class Samples(TrainerCallback):
    """What the model wrote, kept in a file as it comes.

    Args:
        objective: keeps what was written at the steps that are asked for.
        file: one line for each completion.
    """

    def __init__(self, objective: TaskObjective, file: Path) -> None:
        self._objective, self._file = objective, file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run may do its last steps again.
        write_lines(self._file, [line for line in read_lines(self._file) if line["step"] <= state.global_step])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        add_lines(
            self._file, [{"step": state.global_step, "split": "train", **s} for s in self._objective.take_samples()]
        )


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
