"""The development split beside the steps of a run: measured, and the best step remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..averages import NONE
from ..config import AUTO, Train
from ..run_folder import read_lines
from ..tasks import Task
from . import say
from .results import write_lines
from .session import Session

if TYPE_CHECKING:
    from .callbacks import Monitor

# Measurements without improvement after which a run ends behind a walk along the errors. Where there are labels, it was near its end before its first step (docs/feedback.md).
_BEHIND_THE_WALK = 5


class DevWatcher(TrainerCallback):
    """Measures the development split every so many steps, when it is due, and at the end, and remembers which step was best.

    Steps are compared by the loss where that is tuned, as it is less noisy, else by the task's metric, for which the loss decides
    between equals. A run that finds its learning rate is measured before its first step too.

    Args:
        session: its split and options.
        file: where the measurements are kept, so that a resumed run knows them.
        monitor: knows whether steps are held back, so that the weights are still untuned, and whether the time is over.
        report: called with every step, what was measured after it, as something that should fall, and ``is_last``, whether the run ends there.
        improved: called with the model when a step is better than all before it.
        is_due: whether to measure after a step in any case.
        since: steps of a run that had ended, and is made longer: patience counts from there.

    Attributes:
        lines: ``{"step": ..., "dev": ...}`` of every measurement.
        gave_up: patience ended the run.
        log: told what was measured, where the run is reported.
    """

    def __init__(
        self,
        session: Session,
        file: Path,
        monitor: Monitor,
        report: Callable[..., object] = lambda step, value, is_last: None,
        improved: Callable[[Any], object] = lambda model: None,
        is_due: Callable[[int], bool] = lambda step: False,
        since: int = 0,
    ) -> None:
        options = session.options
        self._every, self._patience, self._untuned = options.eval_steps, options.patience, options.lr == AUTO
        self._metric = dev_metric(session)
        self._session, self._file, self._monitor = session, file, monitor
        self._report, self._improved, self._is_due, self._since = report, improved, is_due, since
        self.gave_up = False
        self.log: Callable[[dict[str, float]], object] = lambda values: None
        self.lines = read_lines(file)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best measurement; the earliest of several; None before the first."""
        return max(self.lines, key=self._worth, default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # A resumed run may do its last steps again.
        self.lines = [line for line in self.lines if line["step"] <= state.global_step]
        if state.global_step:  # a kill may have come between a step and its measurement
            self.on_step_end(args, state, control, model)
        elif self._untuned:
            self.measure(0, model, is_last=False)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        last = step == state.max_steps or self._monitor.is_over
        is_planned = self._every is not None and (step % self._every == 0 or self._is_due(step))
        if not last and (not is_planned or self._monitor.held()):
            return
        self.measure(step, model, is_last=last)
        if not last and self._is_in_vain(self.lines):
            say(f"{self._patience} measurements without improvement (--patience): stopping after step {step}")
            self.gave_up = control.should_training_stop = True

    def _is_in_vain(self, lines: list[dict[str, Any]]) -> bool:
        """Whether so many measurements brought nothing."""
        best = max(lines, key=self._worth)["step"]
        in_vain = sum(line["step"] > max(best, self._since) for line in lines)
        return self._patience is not None and in_vain >= self._patience

    def _worth(self, line: dict[str, Any]) -> tuple[float, float]:
        return worth_on_dev(line["dev"], self._metric)

    def measure(self, step: int, model: Any, *, is_last: bool = True) -> dict[str, Any]:
        """Measure after a step, unless that was done. Returns the best measurement."""
        before = self.best
        if not any(line["step"] == step for line in self.lines):
            training = model.training
            dev = self._session.evaluate("dev", "dev", loss_alone=self._session.watched_by_loss)
            model.train(training)
            say(f"step {step}: dev {plainly(dev)}")
            # Reported before it is written: a resumed run measures again what was not reported.
            is_last = is_last or self._is_in_vain([*self.lines, {"step": step, "dev": dev}])
            self._report(step, dev[self._metric] if self._metric == "loss" else -dev[self._metric], is_last=is_last)
            self.log({f"dev_{name}": value for name, value in dev.items() if name != "examples"})
            self.lines.append({"step": step, "dev": dev})
            write_lines(self._file, self.lines)
            if self.best is not before:
                self._improved(model)
        best = self.best
        assert best is not None
        return best


def usual_patience(options: Train, task: Task) -> int | None:
    """The patience of a run that says nothing of it, of rates, measurements and averages: where a task has labels, a walk along the errors leaves next to nothing to gain."""
    says_nothing = (
        options.lr == AUTO and options.eval_steps is None and options.dev_examples != 0 and options.average == NONE
    )
    is_of_labels = options.method == "feedback" and options.objective == "loss" and task.fixed_answers
    return _BEHIND_THE_WALK if says_nothing and is_of_labels else None


def dev_metric(session: Session) -> str:
    """By what measurements of the development split are compared: the loss where that is tuned, else the task's metric."""
    by_loss = session.options.objective == "loss" and session.task.loss != "none"
    return "loss" if by_loss else session.metric


def may_watch_by_loss(session: Session) -> bool:
    """Whether the development split is to be measured by its loss alone beside the steps: where text would be written for the metric,
    measurements are compared by the loss, and the user did not say how often to measure."""
    writes = session.task.free_text and bool(session.task.label)
    return writes and session.options.eval_steps is None and dev_metric(session) == "loss"


def worth_on_dev(dev: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """What was measured, so that a larger one is better."""
    loss = dev.get("loss")
    fallen = -loss if loss is not None and math.isfinite(loss) else -math.inf
    return (fallen, 0.0) if metric == "loss" else (dev[metric], fallen)


def plainly(dev: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in dev.items() if name != "examples")
