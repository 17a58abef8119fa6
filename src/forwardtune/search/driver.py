"""L5: acts on what a search decides: measures, holds and takes steps, sets the rate, goes back. In a Trainer or in a loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..optimizer import MeZO
from ..parameters import dtype_name
from ..trajectory import Log, ReturnPoint, StepLog
from .budget import SCALE_EVALUATIONS, Budget, Plan
from .decisions import Announce, Decision, GoBack, Hold, Measure, Note, SetRate, Take, Try
from .epsilon import check_eps, find_eps
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
        announce: is told what was chosen, and of an eps with which a run would learn from rounding.
        find_lr: whether the run is to find its learning rate.
        find_eps: whether to choose eps.
        model: where the loss is computed; its dtypes are named in messages.
        may_check: whether a given eps is checked, where the run is long enough for it.
    """
    evaluations = len(optimizer.estimator.queries())
    budget = Budget.of(steps, evaluations, find_eps=find_eps)
    dtypes = dtypes_of(optimizer if model is None else model)
    plan: dict[str, Any] = {}
    if find_eps:
        plan["eps"] = _choose(optimizer, held_out, budget.scales, dtypes, announce)
    elif may_check and _CHECK_SHARE * steps * evaluations >= SCALE_EVALUATIONS:
        check_eps(optimizer, held_out(1), dtypes, announce)
    return plan | Plan.of(steps, budget).content() if find_lr else plan


def _choose(
    optimizer: MeZO, held_out: HeldOut, scales: int, dtypes: str, announce: Callable[[str], object]
) -> dict[str, Any]:
    """Give the optimizer the eps that is found with so many scales; returns what was measured, as JSON."""
    measured = find_eps(optimizer, held_out(1), dtypes, announce, most=scales) if scales else []
    if measured:
        optimizer.estimator = replace(optimizer.estimator, eps=measured[-1].eps)
    return {
        "chosen": optimizer.estimator.eps,
        "tried": [scale.content() for scale in measured],
        "evaluations": sum(scale.evaluations for scale in measured),
    }


class SearchDriver:
    """A run of an optimizer that finds its learning rate.

    Args:
        plan: as the log's first note has it.
        steps: of the whole run.
        optimizer: whose run it is.
        log: the open log of the run.
        point: the weights to go back to.
        held_out: measures held-out examples.
        set_rate: lets the run go on with a learning rate, in the course of a schedule if there is one.
        announce: is told of decisions.
        measures: whether held-out examples are measured as planned; else :meth:`measured` is called by someone who does.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int,
        optimizer: MeZO,
        log: StepLog,
        point: ReturnPoint,
        held_out: HeldOut,
        *,
        set_rate: Callable[[float], object],
        announce: Callable[[str], object],
        measures: bool = True,
    ) -> None:
        self._plan, self._optimizer, self._log, self._point = plan, optimizer, log, point
        self._held_out, self._set_rate, self._announce = held_out, set_rate, announce
        self._trial_loss: Callable[[], float] | None = None
        self.search = RateSearch(plan, steps, partial(_first_rate, optimizer), measures=measures)
        self._is_over = False

    def begin(self) -> None:
        """The log was opened, and no step was taken."""
        self._act(self.search.begin())

    def resume(self, log: Log) -> None:
        """The optimizer stands at the last step of this log."""
        self._act(self.search.resume(log))

    def stepped(self) -> bool:
        """The optimizer has taken a step, or holds it back. Returns whether all steps so far were taken."""
        optimizer, record = self._optimizer, self._optimizer.last
        assert record is not None
        if optimizer.held is not None and len(optimizer.held) == self._plan.held:
            self._trial_loss = self._held_out(self._plan.batches)
        loss = math.nan if record.skipped else record.loss
        self._act(self.search.stepped(optimizer.next_step, loss, record.present))
        self._trial_loss = None
        return optimizer.held is None

    def measured(self, step: int, loss: float) -> None:
        """The held-out loss after a step was measured, lower is better; after step 0 that of the untuned model."""
        if not self._is_over:
            self._act(self.search.measured(step, loss))

    def stop(self) -> None:
        """The run ends here, for now or for good: steps that are held back were not taken."""
        if self._optimizer.held is not None:
            drop(self._optimizer)

    def finish(self) -> None:
        """The run is over: nothing goes back any more."""
        self._is_over = True
        self._point.remove()

    def _act(self, decisions: list[Decision]) -> None:
        optimizer, waiting = self._optimizer, deque(decisions)
        while waiting:
            match waiting.popleft():
                case Hold():
                    hold(optimizer)
                case Try(lr):
                    waiting.extend(self.search.tried(self._tried(lr)))
                case Take(lr):
                    take(optimizer, lr)
                case Measure():
                    loss = self._held_out(self._plan.batches)()
                    waiting.extend(self.search.measured(optimizer.next_step, loss))
                case SetRate(lr):
                    self._set_rate(lr)
                case GoBack(step, lr):
                    self._point.go_back(step)
                    self._log.rolled_back(step)
                    self._set_rate(lr)
                case Note(content):
                    self._log.note(content)
                case Announce(text):
                    self._announce(text)

    def _tried(self, lr: float) -> float:
        assert self._trial_loss is not None
        if not lr:
            return self._trial_loss()
        try:
            with trial(self._optimizer, lr, self._point):
                return self._trial_loss()
        except OverflowError:
            return math.inf


def _first_rate(optimizer: MeZO, coefficients: list[Sequence[float]]) -> float:
    rule = optimizer.rule
    return first_rate(
        coefficients,
        eps=optimizer.estimator.eps,
        probes=optimizer.estimator.probes,
        momentum=rule.settings().get("momentum", 0.0) if rule.name in ("sgd", "momentum") else None,
        otherwise=float(optimizer.defaults["lr"]),
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
