"""L5: does what a search decides: measures, holds and takes steps, sets the rate, goes back. In a Trainer or in a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..optimizer import MeZO
from ..parameters import dtype_name
from ..trajectory import Log, ReturnPoint, StepLog
from .budget import SCALE_EVALUATIONS, Plan
from .epsilon import check_eps, set_eps
from .held import drop, hold, take, trial
from .rates import RateSearch, first_rate

#: Measures the loss on so many minibatches of held-out examples, the same ones every time.
HeldOut = Callable[[int], Callable[[], float]]
#: The weights that a run would go back to, while it goes.
RETURN_POINT = "return.bin"
# Share of a run's forward passes for which a given eps is checked, at most.
_CHECK_SHARE = 0.05


def plan_run(
    optimizer: MeZO,
    steps: int,
    held_out: HeldOut,
    announce: Callable[[str], object],
    *,
    find_lr: bool,
    find_eps: bool,
    model: nn.Module | None = None,
    may_check: bool = True,
) -> dict[str, Any]:
    """Plan a new run, before its log begins: choose eps, or check one that was given. Returns the log's first note.

    Args:
        optimizer: its eps is where the choice begins, and is changed.
        steps: of the whole run.
        held_out: measures held-out examples.
        announce: takes what was chosen, or a warning of an eps with which a run would learn from rounding.
        find_lr: whether the run is to find its learning rate.
        find_eps: whether to choose eps.
        model: where the loss is computed; its dtypes are named in messages.
        may_check: whether a given eps is checked, where the run is long enough for it.
    """
    evaluations = len(optimizer.estimator.queries())
    plan = Plan.of(steps, evaluations, find_eps=find_eps, per_example=optimizer.estimator.per_example)
    dtypes = dtypes_of(optimizer if model is None else model)
    content: dict[str, Any] = {}
    if find_eps:
        content["eps"] = set_eps(optimizer, held_out, dtypes, announce, most=plan.scales)
    elif may_check and _CHECK_SHARE * steps * evaluations >= SCALE_EVALUATIONS:
        check_eps(optimizer, held_out(1), dtypes, announce)
    return content | plan.content() if find_lr else content


class SearchDriver:
    """A run of an optimizer that finds its learning rate; the :class:`~forwardtune.search.rates.Actions` of its search.

    Begin with :meth:`begin` or :meth:`resume`.

    Args:
        plan: as the log's first note has it.
        steps: of the whole run.
        optimizer: whose run it is.
        log: the open log of the run.
        point: where the weights to go back to lie.
        held_out: measures held-out examples.
        scheduler: gives the scheduler of the learning rates, or None.
        announce: takes decisions, a line each.
        measures: whether held-out examples are measured as planned; else :meth:`measured` is called by someone who does.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        steps: int,
        optimizer: MeZO,
        log: StepLog,
        point: Path,
        held_out: HeldOut,
        *,
        scheduler: Callable[[], Any],
        announce: Callable[[str], object],
        measures: bool = True,
    ) -> None:
        self._plan, self._optimizer, self._log, self._point_path = Plan.read(plan), optimizer, log, point
        self._held_out, self._scheduler = held_out, scheduler
        self.note, self.announce = log.note, announce
        self._point: ReturnPoint | None = None
        self._trial_loss: Callable[[], float] | None = None
        self._search = RateSearch(self._plan, steps, self, self._first_rate, measures=measures)

    # --- what happens --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The log was opened, and no step was taken."""
        self._point = ReturnPoint(self._point_path, self._optimizer, self._log.base)
        self._search.begin()

    def resume(self, log: Log) -> None:
        """The optimizer stands at the last step of this log, and has a point (:func:`~forwardtune.trajectory.point.keep_point`)."""
        if log.steps:
            self._point = ReturnPoint.resume(self._point_path, self._optimizer, log)
        else:
            self._point = ReturnPoint(self._point_path, self._optimizer, self._log.base)
        self._search.resume(log)

    def stepped(self) -> bool:
        """The optimizer has taken a step, or holds it back. Returns whether all steps so far were taken."""
        optimizer, record = self._optimizer, self._optimizer.last
        assert record is not None
        loss = math.nan if record.skipped else record.loss
        self._search.stepped(optimizer.next_step, loss, record.present)
        self._trial_loss = None
        return optimizer.held is None

    def has_jumped(self, step: int) -> bool:
        """Whether this is the last of the steps that a line search took together."""
        return self._plan.searches and step == self._plan.held

    def measured(self, step: int, loss: float, *, is_last: bool = False) -> None:
        """The held-out loss after a step was measured, lower is better; after step 0 that of the untuned model."""
        if self._point is not None:
            self._search.measured(step, loss, is_last=is_last)

    def stop(self) -> None:
        """The run ends here, for now or for good: steps that are held back were not taken."""
        if self._optimizer.held is not None:
            drop(self._optimizer)

    def finish(self) -> None:
        """The run is over: nothing goes back any more."""
        if self._point is not None:
            self._point.remove()
            self._point = None

    # --- what follows ------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        hold(self._optimizer)

    def try_rate(self, lr: float) -> float:
        if self._trial_loss is None:
            self._trial_loss = self._held_out(self._plan.batches)
        if not lr:
            return self._trial_loss()
        assert self._point is not None
        try:
            with trial(self._optimizer, lr, self._point):
                return self._trial_loss()
        except OverflowError:
            return math.inf

    def take(self, lr: float) -> None:
        take(self._optimizer, lr)

    def measure(self) -> float:
        return self._held_out(self._plan.batches)()

    def set_rate(self, lr: float) -> None:
        set_rates(self._optimizer, self._scheduler(), [lr] * len(self._optimizer.param_groups))

    def go_back(self, step: int, lr: float) -> None:
        assert self._point is not None
        self._point.go_back(step)
        self._log.rolled_back(step)
        self.set_rate(lr)

    def _first_rate(self, coefficients: list[Sequence[float]]) -> float:
        rule = self._optimizer.rule
        return first_rate(
            coefficients,
            eps=self._optimizer.estimator.eps,
            momentum=rule.settings().get("momentum", 0.0) if rule.name in ("sgd", "momentum") else None,
            otherwise=float(self._optimizer.defaults["lr"]),
        )


def set_rates(optimizer: MeZO, scheduler: Any, rates: Sequence[float]) -> None:
    """Give every group of an optimizer its learning rate, at the present point of the schedule's course."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    bases = getattr(scheduler, "base_lrs", None)
    shares = [1.0] * len(rates)
    if bases is not None:
        shares = [now / base for now, base in zip(scheduler.get_last_lr(), bases, strict=True)]
        scheduler.base_lrs = list(rates)
    for group, lr, share in zip(optimizer.param_groups, rates, shares, strict=True):
        group["initial_lr"] = lr
        group["lr"] = lr * share
    if bases is not None:
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def dtypes_of(model: nn.Module | MeZO) -> str:
    """Of the whole model: what an adapter does to the loss is rounded where the rest computes."""
    if isinstance(model, MeZO):
        parameters = model.module.parameters() if model.module is not None else (t.parameter for t in model.tuned)
    else:
        parameters = model.parameters()
    return " and ".join(sorted({dtype_name(p.dtype) for p in parameters if p.is_floating_point()}))
