"""L5: learning rate and eps found in a loop of one's own, by the search that :class:`~forwardtune.MeZOTrainer` has."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import InputError
from ..optimizer import MeZO
from ..points import Closure
from ..trajectory import LogError, StepLog, read_log
from ..trajectory.lock import LogLock
from ..trajectory.log import cut_log, require_no_log
from ..trajectory.point import keep_point, require_room
from ..trajectory.updates import folded_steps
from .driver import RETURN_POINT, SearchDriver, plan_run
from .notes import has_searched, plan_of

_logger = logging.getLogger(__name__)


class AutoLR:
    """A run of :class:`~forwardtune.MeZO` that finds its learning rate, and eps, on held-out examples (``docs/automatic.md``).

    Example::

        def held_out(batches):  # the same examples every time
            return sum(float(loss_of(batch)) for batch in dev[:batches]) / batches

        optimizer = MeZO(model)
        with AutoLR(optimizer, "steps.jsonl", steps=1000, held_out=held_out) as auto:
            for batch in itertools.islice(loader, 1000):
                loss = auto.step(lambda: loss_of(batch))

    On the same minibatches the run takes the course of a :class:`~forwardtune.MeZOTrainer` with ``learning_rate="auto"``, to the
    bit: the first steps are held back, so the weights stay as they are until the rate is chosen, and with the last step they
    are brought back to the best point that was measured. Every parameter group gets the rate that is found.

    Args:
        optimizer: a new one. Its eps is where the choice of eps begins (1e-3; 1e-2 for LoRA, 1e-1 for prefixes), its lr what the
            search begins with where the first steps say nothing.
        path: the step log, which must not exist yet (:class:`~forwardtune.StepLog`). The weights to go back to lie beside it
            while the run goes.
        steps: of the whole run; how much is measured follows from it.
        held_out: called with a number of minibatches n, 16 at most: the mean loss on n minibatches of held-out examples, lower is
            better. They must be the same every time, and are as large as those that are trained on; if there are fewer, all of them.
        find_eps: False: the optimizer's eps stays.
        scheduler: of the optimizer's learning rates, as in ``torch.optim.lr_scheduler``. It goes on from the rate that is found;
            :meth:`step` steps it.
        run: anything to keep in the log's header, as JSON.
        announce: takes decisions, a line each; by default they are logged.

    Raises:
        InputError: the parameter groups have different learning rates; or the disk has no room for the weights to go back to.
        LogError: as :class:`~forwardtune.StepLog`.
    """

    # Opened once the settings are known.
    _log: StepLog | None = None

    def __init__(
        self,
        optimizer: MeZO,
        path: str | PathLike[str],
        *,
        steps: int,
        held_out: Callable[[int], Any],
        find_eps: bool = True,
        scheduler: Any = None,
        run: dict[str, Any] | None = None,
        announce: Callable[[str], object] = _logger.warning,
    ) -> None:
        if optimizer.next_step:
            raise InputError(
                f"the optimizer has taken {optimizer.next_step} steps already: begin with a new one, or AutoLR.resume"
            )
        with self._prepared(optimizer, path, steps, held_out, scheduler, announce):
            require_no_log(self._path)  # before anything is measured
            plan = plan_run(optimizer, steps, self._held_out, announce, find_lr=True, find_eps=find_eps)
            require_room(self._point, optimizer)
            self._log = StepLog(path, optimizer, run, lock=self._lock)
            self._log.note({"plan": plan})
            self._drive(plan).begin()

    @classmethod
    def resume(
        cls,
        optimizer: MeZO,
        path: str | PathLike[str],
        *,
        steps: int,
        held_out: Callable[[int], Any],
        scheduler: Any = None,
        announce: Callable[[str], object] = _logger.warning,
    ) -> AutoLR:
        """Go on with a run that was stopped: the optimizer, over the base weights again, is brought to the log's last step.

        Go on with minibatch ``optimizer.next_step``. The arguments are those of the run.

        Raises:
            LogError: the log is damaged, in use, or of another run, or of one with a learning rate of its own.
        """
        self = cls.__new__(cls)
        with self._prepared(optimizer, path, steps, held_out, scheduler, announce):
            log = read_log(path)
            plan = plan_of(log)
            if "held" not in plan:
                raise LogError(f"the run in {log.path} has a learning rate of its own: resume it with StepLog.resume")
            steps_kept = folded_steps(log, log.steps)
            if not has_searched(log, steps_kept):
                steps_kept = 0  # the first steps are all estimated at the base weights
            if steps_kept < log.steps or not steps_kept:
                log = cut_log(log, steps_kept)
            optimizer.estimator = replace(optimizer.estimator, eps=log.header["eps"])
            if log.steps:
                keep_point(self._point, optimizer, log)
            self._log = StepLog.resume(path, optimizer, lock=self._lock)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the steps were taken by replay, unseen by the scheduler
                for _ in range(log.steps if scheduler is not None else 0):
                    scheduler.step()
            self._drive(plan).resume(log)
        return self

    @contextmanager
    def _prepared(
        self,
        optimizer: MeZO,
        path: str | PathLike[str],
        steps: int,
        held_out: Callable[[int], Any],
        scheduler: Any,
        announce: Callable[[str], object],
    ) -> Iterator[None]:
        """Inside, the log is locked and opened; an error lets go of it again."""
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        if len(rates) > 1:
            raise InputError(
                f"the parameter groups have learning rates of their own ({', '.join(f'{rate:.1e}' for rate in rates)}), and AutoLR "
                "gives all of them the one that it finds: leave lr out of the groups, or step the optimizer without AutoLR"
            )

        @torch.no_grad()
        def measure(batches: int) -> float:
            return float(held_out(batches))

        self.optimizer, self.steps = optimizer, steps
        self._held_out = lambda batches: partial(measure, batches)
        self._scheduler, self._announce = scheduler, announce
        self._path = Path(path)
        self._point = self._path.with_name(f"{self._path.stem}.{RETURN_POINT}")
        self._lock = LogLock(self._path)
        try:
            yield
        except BaseException:
            self._release()
            raise

    def _drive(self, plan: dict[str, Any]) -> SearchDriver:
        assert self._log is not None
        self._driver = SearchDriver(
            plan,
            self.steps,
            self.optimizer,
            self._log,
            self._point,
            self._held_out,
            scheduler=lambda: self._scheduler,
            announce=self._announce,
        )
        return self._driver

    def step(self, closure: Closure | None = None) -> float:
        """Take a step, or hold it back, as :meth:`MeZO.step`; then act on what follows from it. Returns the mean loss.

        Raises:
            RuntimeError: the run has taken all its steps.
        """
        if self.optimizer.next_step >= self.steps:
            raise RuntimeError(f"the run has taken its {self.steps} steps: the rate was found for so many")
        loss = self.optimizer.step(closure)
        if self._scheduler is not None:
            self._scheduler.step()
        self._driver.stepped()
        return loss

    def finish(self) -> None:
        """The run is over: write the log's end line, and remove the weights to go back to."""
        assert self._log is not None
        self._driver.stop()
        self._log.finish()
        self._driver.finish()

    def close(self) -> None:
        """Stop recording. Without :meth:`finish`, the run can be resumed."""
        self._driver.stop()
        self._release()

    def _release(self) -> None:
        if self._log is not None:
            self._log.close()
        self._lock.release()

    def __enter__(self) -> AutoLR:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()
