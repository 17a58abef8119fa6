"""L6: learning rate and eps found for the user, inside :class:`~forwardtune.hf.trainer.MeZOTrainer`.

With ``learning_rate="auto"`` a run

1. estimates its first steps at the base weights and holds them back;
2. takes all of them with the learning rate that is best on held-out examples, found by a line search, and goes on with it;
3. lets the rate rise while held-out losses fall, and goes back to its best point with another one when they do not, or when
   it diverges (:mod:`.guard`). The last step is measured too, so what is kept is the best point that was measured.

With ``eps="auto"`` the scale is measured before the first step (:mod:`.epsilon`). Every decision is a note in the step log, and
the log replays as any other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..method.record import StepRecord
from ..optimizer import MeZO
from ..parameters import dtype_name
from ..trajectory import Log, ReturnPoint, StepLog
from ..trajectory.point import keep_point, require_room
from .auto import AUTO, MEASUREMENTS, SHARE
from .epsilon import EVALUATIONS, Scale, choose_eps, measure
from .guard import SLIGHT, GoBack, Guard
from .line_search import LineSearch, line_search

_logger = logging.getLogger(__name__)

#: The weights that a run would go back to, while it goes.
RETURN_POINT = "return.bin"
# Steps that are held back for the line search, and the share of a short run.
_HELD, _HELD_SHARE = 8, 0.2
# A step moves a weight by this share of eps, root mean square: what the search begins with. Good runs lie within a factor of ten.
_MOVE = 0.3
# Evaluations of a line search, at most, and for which minibatches are set aside; with fewer than the last there is no search.
_TRIES, _PLANNED_TRIES, _LEAST_TRIES = 7, 5, 3
# Minibatches in each.
_MOST_BATCHES = 16
# Scales that the choice of eps measures at most, and its share of the search.
_SCALES, _SCALES_SHARE = 3, 1 / 3
# Share of a run's forward passes for which a given eps is checked, at most.
_CHECK_SHARE = 0.05
_ADVICE = "choose float32, a larger batch, or a larger --eps"
# A given learning rate is too large when a loss of the first steps, before losses have a history, is so many times the first.
_EARLY, _EXPLODED = 8, 10.0


@dataclass(frozen=True)
class Budget:
    """How a run's forward passes are divided.

    Attributes:
        held: steps that are held back for the line search.
        batches: minibatches of held-out examples.
        tries: evaluations of the line search; fewer than 3 mean that there is no search.
        scales: scales that the choice of eps may measure; 0: eps stays as it begins.
    """

    held: int
    batches: int
    tries: int
    scales: int

    @property
    def searches(self) -> bool:
        """Whether there is a line search."""
        return self.tries >= _LEAST_TRIES

    @property
    def updates(self) -> int:
        """Updates that the line search tries, at most."""
        return self.tries * self.held if self.searches else 0

    @classmethod
    def of(cls, steps: int, evaluations: int, *, find_eps: bool) -> Budget:
        """For a run of so many steps of so many evaluations, of which the search takes at most :data:`SHARE`."""
        left = int(SHARE * steps * evaluations)
        scales = min(_SCALES, int(_SCALES_SHARE * left) // EVALUATIONS) if find_eps else 0
        left -= scales * EVALUATIONS
        batches = min(max(left // _PLANNED_TRIES, 1), _MOST_BATCHES)
        return cls(max(1, min(_HELD, int(_HELD_SHARE * steps))), batches, min(_TRIES, left // batches), scales)


class Tunes(Protocol):
    """What is asked of the trainer."""

    args: Any
    state: Any
    lr_scheduler: Any
    model: Any

    @property
    def mezo(self) -> MeZO:
        """The optimizer."""

    @property
    def run_folder(self) -> Path:
        """Where the run's files lie."""

    @property
    def heard_metric(self) -> str:
        """What an evaluation calls the loss on held-out examples."""

    @property
    def can_hold_out(self) -> bool:
        """Whether there are examples of which some can be chosen."""

    def held_out(self, batches: int) -> Callable[[], float]:
        """What measures the loss on so many minibatches of held-out examples."""


class Automatic(TrainerCallback):
    """Finds what is ``"auto"`` in a trainer's arguments, and keeps watch over the run.

    What it knows follows from the log's steps and notes, so a resumed run goes on as if nothing had happened.

    Args:
        trainer: whose run it is.
    """

    # Set when a run begins whose learning rate is found; the guard only once it was found.
    _log: StepLog
    _guard: Guard

    def __init__(self, trainer: Tunes) -> None:
        self._trainer = trainer
        self._plan: dict[str, Any] = {}
        self._point: ReturnPoint | None = None
        self._watches = False
        self._heard = -1
        self._untuned: float | None = None
        self._has_stepped = False
        self._first_loss: float | None = None
        self._alarm: Guard | None = None
        self._is_told: bool | None = None
        #: What is told of decisions.
        self.announce: Callable[[str], object] = _logger.warning

    @property
    def finds_lr(self) -> bool:
        """Whether the learning rate is this object's business."""
        return self._trainer.args.learning_rate == AUTO

    @property
    def is_told(self) -> bool:
        """Whether somebody else measures held-out examples, and reports with :meth:`hear`: Trainer, if it evaluates."""
        if self._is_told is None:
            return bool(self._trainer.args.eval_strategy != IntervalStrategy.NO)
        return self._is_told

    @is_told.setter
    def is_told(self, told: bool) -> None:
        self._is_told = told

    # --- the beginning ---------------------------------------------------------------------------------------------

    def prepare(self, steps: int) -> dict[str, Any]:
        """Choose eps for a new run of so many steps, before its log begins. Returns the plan, the log's first note."""
        optimizer, finds_eps = self._trainer.mezo, self._trainer.args.eps == AUTO
        budget = Budget.of(steps, len(optimizer.estimator.queries()), find_eps=finds_eps)
        plan: dict[str, Any] = {}
        if finds_eps:
            plan["eps"] = self._choose_eps(budget)
        elif _CHECK_SHARE * steps * len(optimizer.estimator.queries()) >= EVALUATIONS and self._trainer.can_hold_out:
            self._check_eps()
        if self.finds_lr:
            plan |= {"held": budget.held, "batches": budget.batches, "tries": budget.tries}
            plan["every"] = max(1, steps // MEASUREMENTS)
            require_room(self._point_path, optimizer)
        return plan

    def _check_eps(self) -> None:
        """Warn of a given eps with which a run of some length would learn from rounding."""
        optimizer = self._trainer.mezo
        scale = measure(optimizer, self._trainer.held_out(1), optimizer.estimator.eps)
        if not scale.survives:
            self.announce(
                f"eps {scale.eps:.1e} is below the spacing of weights in {self._dtypes()}, which keeps {scale.kept:.0%} of a "
                f"perturbation: {_ADVICE}, or let it be found (auto)"
            )
        elif scale.is_finite and scale.signal and not scale.is_clear:
            self.announce(
                f"eps {scale.eps:.1e} moves the loss by {scale.signal:.0e}, of which rounding in {self._dtypes()} is up to "
                f"{math.sqrt(2) * scale.noise:.0e}: {_ADVICE}, or let it be found (auto)"
            )

    def _choose_eps(self, budget: Budget) -> dict[str, Any]:
        optimizer = self._trainer.mezo
        start = optimizer.estimator.eps
        scales: list[Scale] = []
        if budget.scales:
            loss = self._trainer.held_out(1)
            scales = choose_eps(optimizer, loss, start, most=budget.scales)
            optimizer.estimator = replace(optimizer.estimator, eps=scales[-1].eps)
            if not scales[-1].is_finite:
                self.announce(f"the loss is not finite around the untuned weights, down to eps {scales[-1].eps:.1e}")
            elif not scales[-1].is_clear:
                self.announce(
                    f"rounding in {self._dtypes()} hides what a perturbation does to the loss, up to eps "
                    f"{max(s.eps for s in scales):.1e}: {_ADVICE}"
                )
            self.announce(
                f"eps {scales[-1].eps:.1e}: the loss moves by {scales[-1].signal:.1e}, rounding by {scales[-1].noise:.0e}"
            )
        tried = [{"eps": s.eps, "signal": _plain(s.signal), "noise": _plain(s.noise), "kept": s.kept} for s in scales]
        return {"chosen": optimizer.estimator.eps, "tried": tried, "evaluations": sum(s.evaluations for s in scales)}

    def begin(self, log: StepLog, plan: dict[str, Any]) -> None:
        """Start a new run, whose log was opened."""
        self._log, self._plan, self._watches, self._heard, self._untuned = log, plan, False, -1, None
        if plan:
            log.note({"plan": plan})
        if self.finds_lr:
            self._point = ReturnPoint(self._point_path, self._trainer.mezo, log.base)
            self._trainer.mezo.hold()

    def resume(self, log: StepLog, before: Log) -> None:
        """Go on with a run whose log was ``before``, at its last step."""
        self._log, self._plan = log, plan_of(before)
        if not self.finds_lr:
            return
        self._watches, self._heard, self._untuned = False, -1, _heard_at_start(before)
        if before.steps == 0:
            self._point = ReturnPoint(self._point_path, self._trainer.mezo, log.base)
            self._trainer.mezo.hold()
            return
        self._point = ReturnPoint.resume(self._point_path, self._trainer.mezo, before)
        decisions = self._recall(before)
        self._watches = True
        self._set_rate(self._guard.lr)
        if len(decisions) > len(before.rollbacks):  # a kill came between a decision and what followed from it
            self._go_back(decisions[-1])
        elif self._is_due(before.steps):  # or between a step and its measurement
            self._measure(before.steps)

    def keep_point(self, optimizer: MeZO, log: Log) -> None:
        """See to a way back for a run that is resumed, before its base weights are moved."""
        if self.finds_lr and log.steps:
            keep_point(self._point_path, optimizer, log)

    def _recall(self, log: Log) -> list[GoBack]:
        """Tell a new guard all that the old one was told; returns what it decides."""
        told: dict[int, list[dict[str, Any]]] = {}
        for note in log.notes:
            told.setdefault(note.at, []).append(note.content)
        held = self._plan["held"]
        self._guard = self._new_guard(log.records[held - 1].lr[0], held)
        decisions: list[GoBack | None] = []
        for step, record in enumerate(log.records, start=1):
            decisions.append(self._guard.stepped(_loss(record)))
            for content in told.get(step, ()):
                if "search" in content:
                    self._tell_search(step, content["search"])
                if "held_out" in content:
                    self._heard = step
                    decisions.append(self._guard.measured(step, float(content["held_out"])))
        return [decision for decision in decisions if decision is not None]

    # --- the course ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._alarm = None if self.finds_lr else Guard(args.learning_rate)
        self._has_stepped, self._first_loss = False, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._trainer.mezo
        self._has_stepped = True
        if not self.finds_lr:
            self._listen(state.global_step)
            return
        if optimizer.held is not None:
            if len(optimizer.held) < self._plan["held"]:
                control.should_save = control.should_training_stop = False  # what is held is in no checkpoint
                return
            self._search()
        elif optimizer.last is not None:
            self._act(self._guard.stepped(_loss(optimizer.last)))
        if self._is_due(state.global_step):
            self._measure(state.global_step)
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True  # the last steps are judged as well, however many they are

    def _listen(self, step: int) -> None:
        """Warn, once, of a given learning rate with which the run diverges."""
        last = self._trainer.mezo.last
        if self._alarm is None or last is None:
            return
        loss = _loss(last)
        if self._first_loss is None and math.isfinite(loss):
            self._first_loss = loss
        early = step <= _EARLY and self._first_loss is not None and loss > _EXPLODED * max(1.0, abs(self._first_loss))
        if self._alarm.stepped(loss) is None and not early:
            return
        self._alarm = None
        self.announce(
            f"the loss has left its range by step {step}: lower the learning rate, or let it be found (auto), which also goes "
            "back when that happens"
        )

    def _is_due(self, step: int) -> bool:
        last = step >= self._trainer.state.max_steps
        return not self.is_told and (last or step % self._plan["every"] == 0) and step > self._heard

    def _measure(self, step: int) -> None:
        self.hear(step, self._trainer.held_out(self._plan["batches"])())

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # What eval_on_start measures of a resumed run, the run without a kill did not hear.
        resumed = state.global_step > 0 and not self._has_stepped
        if metrics and self._trainer.heard_metric in metrics and not resumed:
            self.hear(state.global_step, metrics[self._trainer.heard_metric])

    def hear(self, step: int, loss: float) -> None:
        """Hear the loss on held-out examples after a step, lower is better; after step 0 that of the untuned model."""
        if not self.finds_lr:
            return
        if step == 0 and self._untuned is None:
            self._log.note({"held_out": _plain(loss)})
            self._untuned = loss
        if not self._watches or step <= self._heard:
            return
        self._heard = step
        self._log.note({"held_out": _plain(loss)})
        before = self._guard.lr
        self._act(self._guard.measured(step, loss))
        if self._guard.lr != before:
            self._set_rate(self._guard.lr)

    def _search(self) -> None:
        """Choose the learning rate, and take the steps that were held back."""
        optimizer, plan = self._trainer.mezo, self._plan
        held, point = optimizer.held or [], self._point
        assert point is not None
        held_out = self._trainer.held_out(plan["batches"])

        def loss_at(lr: float) -> float:
            if lr:
                try:
                    optimizer.try_held(lr)
                except OverflowError:
                    return math.inf
            try:
                return held_out()
            finally:
                if lr:
                    point.restore()
                    optimizer.moved_back()

        start = self._first_guess()
        tried: dict[float, float] = {}
        lr = start
        if plan["tries"] >= _LEAST_TRIES:
            found = line_search(loss_at, start, most=plan["tries"])
            tried, lr = found.tried, size_found(found)
        elif not self.is_told:
            self.hear(0, held_out())  # no search, but a point to go back to
        optimizer.release(lr)
        search = {"lr": lr, "tried": [[size, _plain(loss)] for size, loss in tried.items()]}
        self._log.note({"search": search})
        shown = ", ".join(f"{size:.1e}: {loss:.4f}" for size, loss in sorted(tried.items()))
        unsearched = f", a guess: a run of {self._trainer.state.max_steps} steps is too short for a search"
        self.announce(f"learning rate {lr:.1e}" + (f"; losses of held-out examples: {shown}" if shown else unsearched))
        self._guard, self._watches = self._new_guard(lr, len(held)), True
        for record in held:
            self._guard.stepped(_loss(record))
        self._tell_search(len(held), search)
        self._set_rate(lr)

    def _tell_search(self, step: int, search: dict[str, Any]) -> None:
        """Tell the guard what a search measured, unless other examples are measured from now on."""
        tried = {size: float(loss) for size, loss in search["tried"]}
        if tried and not self.is_told:
            self._guard.known(0, tried[0.0])
            self._guard.known(step, tried[search["lr"]])
            self._heard = step

    def _new_guard(self, lr: float, held: int) -> Guard:
        guard = Guard(lr, best_step=held)
        if self._untuned is not None:
            guard.known(0, self._untuned)
        return guard

    def _first_guess(self) -> float:
        """The learning rate with which a step of the size seen moves a weight by a set share of eps."""
        optimizer = self._trainer.mezo
        taken = [record for record in optimizer.held or () if not record.skipped]
        unit = 1.0  # rules that normalise move a weight by about the learning rate itself
        if optimizer.rule.name in ("sgd", "momentum"):
            probes = optimizer.estimator.probes
            unit = math.sqrt(sum(c * c for r in taken for c in r.present) / max(1, len(taken))) / probes
            unit /= 1 - optimizer.rule.settings().get("momentum", 0.0)
        guess = _MOVE * optimizer.estimator.eps / unit if unit else 0.0
        return guess if 0 < guess < math.inf else float(optimizer.defaults["lr"])

    def _act(self, decision: GoBack | None) -> None:
        if decision is not None:
            self._go_back(decision)

    def _go_back(self, decision: GoBack) -> None:
        why = {"diverged": "the loss left its range", "worse": "worse than before"}[decision.why]
        over = self._trainer.mezo.next_step >= self._trainer.state.max_steps
        then = "where the run ends" if over else f"learning rate {decision.lr:.1e}"
        self.announce(f"{why}: back to the weights of step {decision.step}, {then}")
        assert self._point is not None
        self._point.go_back(decision.step)
        self._log.rolled_back(decision.step)
        self._set_rate(decision.lr)

    def _set_rate(self, lr: float) -> None:
        set_rates(self._trainer.mezo, self._trainer.lr_scheduler, [lr] * len(self._trainer.mezo.param_groups))

    def stop(self) -> None:
        """The run ends here, for now or for good: steps that are held back were not taken."""
        if self._trainer.mezo.held is not None:
            self._trainer.mezo.drop()

    def finish(self) -> None:
        """The run is over: nothing goes back any more."""
        if self.finds_lr:
            self._watches = False
            if self._point is not None:
                self._point.remove()
            self._point_path.unlink(missing_ok=True)

    def forget(self) -> None:
        """The run will not be gone on with, as a trial that was pruned: leave nothing large behind."""
        self._point_path.unlink(missing_ok=True)

    def _dtypes(self) -> str:
        """Of the whole model: what an adapter does to the loss is rounded where the rest computes."""
        parameters = self._trainer.model.parameters()
        return " and ".join(sorted({dtype_name(p.dtype) for p in parameters if p.is_floating_point()}))

    @property
    def _point_path(self) -> Path:
        return self._trainer.run_folder / RETURN_POINT


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


def plan_of(log: Log) -> dict[str, Any]:
    """What was planned when the run began."""
    return next((note.content["plan"] for note in log.notes if "plan" in note.content), {})


def has_searched(log: Log, steps: int) -> bool:
    """Whether the learning rate was found within so many steps."""
    return any("search" in note.content and note.at <= steps for note in log.notes)


def has_measured(log: Log) -> bool:
    """Whether held-out examples were measured after the last step."""
    return any("held_out" in note.content and note.at == log.steps for note in log.notes)


def found(log: Log) -> dict[str, Any]:
    """What a run found, for people: learning rates, eps, forward passes of the search, how often it went back."""
    plan = plan_of(log)
    search = next((note.content["search"] for note in log.notes if "search" in note.content), None)
    spent = plan.get("eps", {}).get("evaluations", 0)
    if search is not None:
        spent += plan["batches"] * len(search["tried"])
    rates = [max(record.lr) for record in log.records]
    return {
        "learning_rate": {"first": rates[0], "last": rates[-1]} if rates else None,
        "eps": log.header["eps"],
        "search_forwards": spent,
        "rollbacks": len(log.rollbacks),
    }


def _heard_at_start(log: Log) -> float | None:
    """The untuned model's held-out loss, if it was measured."""
    heard = (note.content["held_out"] for note in log.notes if note.at == 0 and "held_out" in note.content)
    return next(map(float, heard), None)


def size_found(found: LineSearch) -> float:
    """The learning rate that follows from a line search.

    Few directions and few examples often show no gain where longer runs have one. Then the rate is the largest that did little
    harm; held-out losses make it rise or fall from there.
    """
    untuned = found.tried[0.0]
    slight = SLIGHT * abs(untuned)
    if untuned - found.tried[found.best] > slight:
        return found.best
    harmless = [size for size, loss in found.tried.items() if size and loss - untuned <= slight]
    return max(harmless, default=min(size for size in found.tried if size))


def _loss(record: StepRecord) -> float:
    return math.nan if record.skipped else record.loss


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)
