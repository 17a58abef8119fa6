"""L6: what ``"auto"`` stands for in a :class:`~forwardtune.hf.trainer.MeZOTrainer`'s arguments: Trainer's events, put to a search."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, has_length

from ..config import AUTO
from ..optimizer import MeZO
from ..search.driver import RETURN_POINT, SearchDriver, plan_run
from ..search.guard import GivenRate
from ..trajectory import Log, StepLog
from ..trajectory.point import keep_point, require_room

_logger = logging.getLogger(__name__)


class Automatic(TrainerCallback):
    """Puts Trainer's events to a :class:`~forwardtune.search.driver.SearchDriver`, or watches a learning rate that was given.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer` whose run it is.

    Attributes:
        announce: is told of decisions.
        measured_elsewhere: held-out examples are measured by someone who calls :meth:`measured`, as Trainer does if it evaluates.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._driver: SearchDriver | None = None
        self._given: GivenRate | None = None
        self._has_stepped = self.measured_elsewhere = False
        self.announce: Callable[[str], object] = _logger.warning

    @property
    def finds_lr(self) -> bool:
        """Whether the learning rate is this object's business."""
        return bool(self._trainer.args.learning_rate == AUTO)

    @property
    def is_measured(self) -> bool:
        """Whether somebody else measures held-out examples."""
        return bool(self.measured_elsewhere or self._trainer.args.eval_strategy != IntervalStrategy.NO)

    def has_jumped(self, step: int) -> bool:
        """Whether the steps that were held back were taken just now: a point to go back to, as what follows may lead away from it."""
        return self._driver is not None and self._driver.has_jumped(step)

    @property
    def _point_path(self) -> Path:
        return Path(self._trainer.run_folder / RETURN_POINT)

    # --- the beginning and the end, around the log's -----------------------------------------------------------------

    def plan(self, steps: int) -> dict[str, Any]:
        """Plan a new run of so many steps, before its log begins. Returns the plan, the log's first note."""
        trainer = self._trainer
        if trainer.mezo.lacks_layers:
            trainer.mezo.measure_layers(held_out(trainer, 1))
        plan = plan_run(
            trainer.mezo,
            steps,
            partial(held_out, trainer),
            self.announce,
            find_lr=self.finds_lr,
            find_eps=trainer.args.eps == AUTO,
            model=trainer.model,
            may_check=can_hold_out(trainer),
        )
        if self.finds_lr:
            require_room(self._point_path, trainer.mezo)
        return plan

    def begin(self, log: StepLog, plan: dict[str, Any], before: Log | None = None) -> None:
        """A planned run begins, whose log was opened, or goes on after the last step of the log ``before``."""
        trainer = self._trainer
        self._driver, self._has_stepped = None, False
        self._given = None if self.finds_lr else GivenRate(trainer.args.learning_rate)
        if plan and before is None:
            log.note({"plan": plan})
        if not self.finds_lr:
            return
        self._driver = SearchDriver(
            plan,
            trainer.state.max_steps,
            trainer.mezo,
            log,
            self._point_path,
            partial(held_out, trainer),
            scheduler=lambda: trainer.lr_scheduler,
            announce=self.announce,
            measures=not self.is_measured,
        )
        if before is None:
            self._driver.begin()
        else:
            self._driver.resume(before)

    def keep_point(self, optimizer: MeZO, log: Log) -> None:
        """See to a way back for a run that is resumed, before its base weights are moved."""
        if self.finds_lr and log.steps:
            keep_point(self._point_path, optimizer, log)

    def stop(self) -> None:
        """The run ends here, for now or for good: steps that are held back were not taken."""
        if self._driver is not None:
            self._driver.stop()

    def finish(self) -> None:
        """The run is over: nothing goes back any more."""
        if self._driver is not None:
            self._driver.finish()
        if self.finds_lr:
            self.forget()
        self._driver = None

    def forget(self) -> None:
        """The run will not be gone on with, as a trial that was pruned: leave nothing large behind."""
        self._point_path.unlink(missing_ok=True)

    # --- the course --------------------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_stepped = True
        last = self._trainer.mezo.last
        if self._driver is not None:
            if not self._driver.stepped():
                control.should_save = control.should_training_stop = False  # what is held is in no checkpoint
            elif args.eval_strategy == IntervalStrategy.STEPS and (
                state.global_step >= state.max_steps or self.has_jumped(state.global_step)
            ):
                control.should_evaluate = True  # the last steps are judged as well, however many they are
        elif self._given is not None and last is not None:
            warning = self._given.stepped(state.global_step, math.nan if last.skipped else last.loss)
            if warning is not None:
                self.announce(warning)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # What eval_on_start measures of a resumed run, the run without a kill did not measure.
        resumed = state.global_step > 0 and not self._has_stepped
        datasets = self._trainer.eval_dataset  # of several, the first is looked at
        name = f"eval_{next(iter(datasets))}_loss" if isinstance(datasets, dict) and datasets else "eval_loss"
        if metrics and name in metrics and not resumed:
            self.measured(state.global_step, metrics[name])

    def measured(self, step: int, loss: float, *, is_last: bool = False) -> None:
        """The loss on held-out examples after a step was measured, lower is better; after step 0 that of the untuned model. With the last one the run goes back to its best
        point."""
        if self._driver is not None:
            self._driver.measured(step, loss, is_last=is_last)


def _held_out_dataset(trainer: Any) -> Any:
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset


def can_hold_out(trainer: Any) -> bool:
    """Whether :func:`held_out` has a dataset from which examples can be chosen."""
    return has_length(_held_out_dataset(trainer))


def held_out(trainer: Any, batches: int) -> Callable[[], float]:
    """A function that measures the loss of the present weights on so many minibatches of held-out examples.

    They are spread over ``eval_dataset``, or else ``train_dataset``, and are the same every time; so are the random numbers of
    an objective that samples.
    """
    dataset, size = _held_out_dataset(trainer), trainer.args.per_device_train_batch_size
    if not has_length(dataset):
        raise ValueError(
            "learning_rate='auto' and eps='auto' measure held-out examples, and this dataset has no length: pass an "
            "eval_dataset that has one, or give numbers"
        )
    count = len(dataset)
    wanted = min(count, batches * size)
    spread = Subset(dataset, [i * count // wanted for i in range(wanted)])
    loader = DataLoader(spread, batch_size=size, collate_fn=trainer.get_eval_dataloader(spread).collate_fn)
    inputs = [trainer._prepare_inputs(batch) for batch in loader]

    @torch.no_grad()
    def measure() -> float:
        trainer.model.eval()
        trainer.step_losses.tell("begin_step", 0, 0)
        trainer.step_losses.tell("end_step")  # nothing of this belongs to a step's statistics

        def loss(batch: Any) -> float:
            with trainer.compute_loss_context_manager():
                return float(trainer.compute_loss(trainer.model, dict(batch)))

        losses = trainer.workers.divided(loss, inputs)
        return math.fsum(losses) / len(losses)

    return measure
