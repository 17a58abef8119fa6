"""A run of either method, and what goes on beside its steps: the progress bar, Ctrl-C, the clock, the objective's log."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from .. import memory
from ..evaluation import with_common_beginning
from ..objectives import TaskObjective
from ..optimizer import MeZO
from ..points.idle import summary
from ..run_folder import COMPLETIONS, DEV, TERMS, read_lines
from ..storage import device_of
from ..tasks.batching import collate
from ..tasks.encoding import Encoded
from ..workers import Alone
from . import say
from .dev import DevWatcher
from .progress import bar
from .results import add_lines, write_lines
from .session import Session

# The loss of a minibatch jumps about: the bar shows the mean of so many.
_WINDOW = 20
# A run is reported so many times to what draws it.
_LOGGED = 500
# After so many steps one sees whether an objective moves anything: from this share on that moved nothing, advice is given.
_EARLY, _MANY_FLAT = 25, 0.2
# Seconds between two times at which freed memory is returned, which takes 0.03 s.
_TRIMMED_EVERY = 5.0


class Monitor(TrainerCallback):
    """Moves the progress bar, with the recent mean loss, and ends the run after Ctrl-C or when its time is over.

    Args:
        session: what is tuned, and until when.
        last: what the last step gave: its ``loss``, and whether it was ``skipped`` or ``flat``.
        held: whether steps are held back, so that the run cannot be stopped after this one.

    Attributes:
        is_over: the time was over before the last step.
    """

    def __init__(self, session: Session, last: Callable[[], Any], held: Callable[[], bool]) -> None:
        self._options, self._deadline, self._workers = session.options, session.deadline, session.workers
        self._last, self.held = last, held
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._steps = self._skipped = self._flat = 0
        self._interrupted = self.is_over = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = self._last()
        self._steps += 1
        self._skipped += last.skipped
        self._flat += last.flat
        if not last.skipped:
            self._recent.append(last.loss)
        mean = sum(self._recent) / len(self._recent) if self._recent else math.nan
        shown = f"loss {mean:.4f}" if self._options.objective == "loss" else f"objective {-mean:.4f}"
        shown += f", {self._skipped} skipped" if self._skipped else ""
        shown += f", {self._flat} moved nothing" if self._flat else ""
        self._progress.set_postfix_str(shown, refresh=False)
        self._progress.update(1)
        is_last = state.global_step >= state.max_steps
        if self._steps == _EARLY and not is_last:
            advise(self._options.objective, self._flat, self._steps)
        if self.held():
            return
        # Several workers stop after the same step.
        over = self._workers.any(self._deadline is not None and time.monotonic() >= self._deadline)
        self._interrupted = self._workers.any(self._interrupted)
        if over and not is_last:
            self.is_over = control.should_training_stop = True
            say(f"the time is over after step {state.global_step} of {state.max_steps}")
        if self._interrupted:
            control.should_training_stop = True
            control.should_save = self._options.method != "adam"

    @contextmanager
    def watch(self, done: int) -> Iterator[None]:
        """Inside, a bar shows the steps, of which so many were done before; the first Ctrl-C ends the run after its step, the
        second interrupts at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            say("\nstopping after this step; Ctrl-C again to stop at once (the step log stays intact)")

        before = signal.signal(signal.SIGINT, note)
        try:
            with bar(self._options.steps, "tuning", "step", done) as self._progress:
                yield
        finally:
            signal.signal(signal.SIGINT, before)


def advise(objective: str, flat: int, steps: int) -> None:
    """Say what helps, if many steps moved nothing, because both sides of a probe had the same objective."""
    if flat <= _MANY_FLAT * steps:
        return
    what = f"in {flat} of {steps} steps ({flat / steps:.0%}) both sides of the probe had the same"
    if objective == "loss":  # which is smooth: the model is broken, or rounding hides the perturbation
        say(f"{what} loss, so they moved nothing. What helps: a lower --lr, if the loss has risen; else a larger --eps")
    else:
        say(
            f"{what} objective, so they moved nothing. What helps: more --probes, a larger --batch-size, a larger --eps, or an "
            "objective with a smooth part such as 'accuracy + 0.1 * loss', where the task has answers"
        )


class Copied(TrainerCallback):
    """Says once which weights are read outside the modules that own them, as in hybrids, and so are perturbed as a whole."""

    def __init__(self, optimizer: Callable[[], MeZO]) -> None:
        self._optimizer, self._is_told = optimizer, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._optimizer()
        copied = optimizer.evaluator.copied
        if copied and not self._is_told:
            self._is_told = True
            numel = sum(optimizer.tuned[i].parameter.numel() for i in copied)
            say(
                f"{len(copied)} of {len(optimizer.tuned)} tuned tensors are read outside the modules that own them "
                f"({summary(optimizer.tuned, sorted(copied))}): a perturbed copy of their {numel:,} weights is kept, of "
                f"{optimizer.tuned.numel:,}"
            )


class Trimmer(TrainerCallback):
    """Returns freed memory to the system now and then: minibatches of ever other lengths leave holes in the heap, a megabyte a step."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (now := time.monotonic()) - self._last >= _TRIMMED_EVERY:
            memory.trim()
            self._last = now


class ObjectiveLog(TrainerCallback):
    """What the objective gave in every step, kept in files as it comes: mean and spread of its terms, and what was written.

    Args:
        folder: of the run.
        workers: the processes that evaluate it.
        completions: whether the objective keeps what was written, at the steps that it was asked for.
    """

    def __init__(self, objective: TaskObjective, folder: Path, workers: Alone, *, completions: bool) -> None:
        self._objective, self._folder, self._workers = objective, folder, workers
        self._files = (TERMS, COMPLETIONS) if completions else (TERMS,)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for file in (self._folder / name for name in self._files):  # a resumed run may do its last steps again
            write_lines(file, [line for line in read_lines(file) if line["step"] <= state.global_step])
        self._objective.take_statistics()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, objective = state.global_step, self._objective
        objective.gather(self._workers)
        add_lines(self._folder / TERMS, [{"step": step, "objective": objective.take_statistics()}])
        written = [{"step": step, "split": "train", **sample} for sample in objective.take_samples()]
        add_lines(self._folder / COMPLETIONS, written)


@dataclass
class Trained:
    """What came of tuning: facts for ``metrics.json``, and the course of the run, a line for each step."""

    facts: dict[str, Any]
    history: list[dict[str, Any]]


class Run:
    """A trainer's run, with a progress bar, Ctrl-C, the clock and the development split.

    Args:
        folder: where the measurements of the development split are kept.
        last, held: as :class:`Monitor` wants them.
        measured: what :class:`DevWatcher` is to call.
    """

    def __init__(
        self,
        session: Session,
        trainer: Any,
        folder: Path,
        *,
        last: Callable[[], Any],
        held: Callable[[], bool] = lambda: False,
        **measured: Any,
    ) -> None:
        self._session, self._trainer, self._peak = session, trainer, 0
        self._monitor = Monitor(session, last, held)
        self.dev = DevWatcher(session, folder / DEV, self._monitor, **measured) if "dev" in session.splits else None
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self._monitor)
        if device_of(session.model).type == "cpu":
            trainer.add_callback(Trimmer())
        if self.dev is not None:
            if trainer.args.report_to:
                self.dev.log = trainer.log
            trainer.add_callback(self.dev)

    def train(self, done: int = 0, **how: Any) -> None:
        """Train until the end or Ctrl-C; so many steps were done before."""
        memory.reset_peak(device_of(self._session.model))
        with self._monitor.watch(done):
            self._trainer.train(**how)
        self._peak = memory.peak(device_of(self._session.model))

    @property
    def _stopped(self) -> str | None:
        """What ended the run early as it was told to."""
        return "patience" if self.dev is not None and self.dev.gave_up else "time" if self._monitor.is_over else None

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self._trainer.state.global_step < self._session.options.steps and self._stopped is None

    def facts(self, steps: Sequence[Any]) -> dict[str, Any]:
        """What ``metrics.json`` says of these steps."""
        seconds, best = sum(step.seconds for step in steps), self.dev.best if self.dev else None
        return {
            "seconds": seconds,
            "seconds_per_step": seconds / max(1, len(steps)),
            "peak_memory_bytes": self._peak,
            "steps": len(steps),
            "skipped_steps": sum(step.skipped for step in steps),
            **({} if self._stopped is None else {"stopped": self._stopped}),
            **({} if best is None else {"dev": best["dev"], "best_step": best["step"]}),
        }

    def history(self, steps: Sequence[Any], terms: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """A line for each step with its loss and the seconds so far, then the measurements on the dev split."""
        seconds = [0.0, *accumulate(step.seconds for step in steps)]
        lines = [{"step": i, "seconds": seconds[i], "loss": step.loss} for i, step in enumerate(steps, start=1)]
        for line in terms:
            lines[line["step"] - 1]["objective"] = line["objective"]
        measured = self.dev.lines if self.dev else []
        return lines + [{"step": m["step"], "seconds": seconds[m["step"]], "dev": m["dev"]} for m in measured]


def reporting(report_to: str | None, steps: int) -> dict[str, Any]:
    """Trainer's arguments for what a run is reported to."""
    if not report_to:
        return {"report_to": [], "logging_strategy": "no"}
    return {"report_to": report_to.split(","), "logging_strategy": "steps", "logging_steps": max(1, steps // _LOGGED)}


def ingredients(session: Session, objective: Callable[[Any, Any], Tensor]) -> dict[str, Any]:
    """What both trainers get."""
    layout = session.layout
    if getattr(session.options, "assignment", "shared") == "shared":
        generates = isinstance(objective, TaskObjective) and objective.generates
        train = session.splits["train"]
        layout = with_common_beginning(session.model, session.tokenizer, train, layout, generates=generates)

    def minibatch(examples: list[Encoded]) -> dict[str, Any]:
        return {**collate(examples, layout), "examples": examples}

    return {
        "model": session.model,
        "train_dataset": session.splits["train"],
        "data_collator": minibatch,
        "processing_class": session.tokenizer,
        "objective": objective,
    }
