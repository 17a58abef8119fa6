"""L0: a run that finds its learning rate, as a state machine: events come in, actions go out.

A run

1. estimates its first steps at the base weights and holds them back;
2. takes all of them with the learning rate that is best on held-out examples, found by a line search, and goes on with it;
3. lets the rate rise while held-out losses fall, and goes back to its best point with another one when they do not, or when
   it diverges (:mod:`.guard`). The last step is measured too, so what is kept is the best point that was measured.

Nothing here knows of weights, files or a Trainer: :mod:`.driver` acts in a run, ``benchmarks/rates.py`` in a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..files import plain
from .budget import Plan
from .guard import SLIGHT, GoBack, Guard
from .line_search import LineSearch, line_search

if TYPE_CHECKING:
    from ..trajectory import Log

# A step moves a weight by this share of eps, root mean square: what the search begins with. Good runs lie within a factor of ten.
_MOVE = 0.3


class Actions(Protocol):
    """What a search has done: in a run, or in a simulation of one."""

    def hold(self) -> None:
        """Estimate steps at the present weights from now on, without taking them."""

    def try_rate(self, lr: float) -> float:
        """The held-out loss where the held steps would lead with this rate; at rate 0, that of the present weights.

        Infinite if a step does not fit float32.
        """

    def take(self, lr: float) -> None:
        """Take the steps that are held, with this rate; those that follow are taken as they come."""

    def measure(self) -> float:
        """The held-out loss of the present weights."""

    def set_rate(self, lr: float) -> None:
        """Go on with this learning rate; a schedule goes on from it."""

    def go_back(self, step: int, lr: float) -> None:
        """Go on from the weights after so many steps, with this learning rate."""

    def note(self, content: dict[str, Any]) -> None:
        """Keep this beside the steps: what was decided, and what it was based on."""

    def announce(self, text: str, /) -> object:
        """Tell people."""


class RateSearch:
    """The learning rate of one run.

    Its state follows from the steps and notes of the run's log, so a resumed run goes on as if nothing had happened.

    Args:
        plan: how many steps are held, and how much is measured.
        steps: steps of the whole run.
        run: does what is decided.
        first_rate: the rate that the search begins with, from the coefficients of the held steps that were not skipped.
        measures: whether held-out examples are measured as planned; else :meth:`measured` is called by someone who does.
        guard: makes the watch over the losses, from the rate and the step to go back to at first; by default as it is planned.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int,
        run: Actions,
        first_rate: Callable[[list[Sequence[float]]], float],
        *,
        measures: bool = True,
        guard: Callable[[float, int], Guard] | None = None,
    ) -> None:
        self.plan = plan
        self._steps, self._run, self._first_rate = steps, run, first_rate
        self._measures = measures
        self._new_guard = guard or partial(Guard, rise=plan.rise, patience=plan.patience)
        self._guard: Guard | None = None
        self._held: list[tuple[float, Sequence[float]]] = []
        self._measured = -1
        self._untuned: float | None = None
        self._went_back: tuple[str, int] | None = None  # why, and where to, the last time

    # --- what happens --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The run begins."""
        self._run.hold()

    def stepped(self, step: int, loss: float, coefficients: Sequence[float]) -> None:
        """A step was estimated and held, or was taken.

        Args:
            step: number of steps since the run began, this one included.
            loss: of its minibatch; not finite if the step was skipped.
            coefficients: empty if the step was skipped.
        """
        if self._guard is not None:
            self._follow(self._guard.stepped(loss), step)
            self._measure_if_due(step)
            return
        self._held.append((loss, coefficients))
        if len(self._held) == self.plan.held:
            self._choose()

    def measured(self, step: int, loss: float, *, is_last: bool = False) -> None:
        """The held-out loss after a step was measured, lower is better; after step 0 that of the untuned model. The run may end there before its last planned step."""
        is_last = is_last or step >= self._steps
        if step == 0:
            self._note_untuned(loss)
        if self._guard is None or step <= self._measured:
            return
        self._measured = step
        before = self._guard.lr
        self._run.note({"held_out": plain(loss)})
        self._follow(self._guard.measured(step, loss, is_last=is_last), step, is_last=is_last)
        if self._guard.lr != before:
            self._run.set_rate(self._guard.lr)

    def resume(self, log: Log) -> None:
        """The run goes on after the last step of its log."""
        noted = (note.content["held_out"] for note in log.notes if note.at == 0 and "held_out" in note.content)
        self._untuned = next(map(float, noted), None)
        if log.steps == 0:
            self.begin()
            return
        guard, decided = self._replay(log)
        self._run.set_rate(guard.lr)
        if len(decided) > len(log.rollbacks):  # a kill came between a decision and what followed from it
            self._follow(decided[-1], log.steps)
        else:  # or between a step and its measurement
            self._measure_if_due(log.steps)

    # --- what follows ------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Find the rate for the steps that are held back, take them, and watch those that follow."""
        lr = self._first_rate([coefficients for _, coefficients in self._held if coefficients])
        tried: dict[float, float] = {}
        if self.plan.searches:
            search = line_search(self._run.try_rate, lr, most=self.plan.tries)
            found, tried = rate_found(search), search.tried
            lr = share_of(found, self.plan.share, tried)
        elif self._measures:  # a point to go back to
            self._note_untuned(self._run.try_rate(0.0))
        held, self._held = self._held, []
        guard = self._watch_behind(lr)
        for loss, _ in held:
            guard.stepped(loss)
        self._count_search(guard, len(held), lr, tried)
        self._run.take(lr)
        self._run.note({"search": {"lr": lr, "tried": [[size, plain(loss)] for size, loss in tried.items()]}})
        shown = ", ".join(f"{size:.1e}: {loss:.4f}" for size, loss in sorted(tried.items()))
        unsearched = f", a guess: a run of {self._steps} steps is too short for a search"
        part = "" if self.plan.share == 1 else ", a part of the best for the first steps, as later ones bear less"
        why = f"{part}; losses of held-out examples: {shown}" if shown else unsearched
        self._run.announce(f"learning rate {lr:.1e}{why}")
        self._run.set_rate(lr)
        self._measure_if_due(len(held))

    def _replay(self, log: Log) -> tuple[Guard, list[GoBack]]:
        """A new watch that was given all that the old one was given, and the ways back that it decided."""
        notes: dict[int, list[dict[str, Any]]] = {}
        for note in log.notes:
            notes.setdefault(note.at, []).append(note.content)
        guard = self._watch_behind(log.records[self.plan.held - 1].lr[0])
        # Where it went back, a step may have been the last one, behind which a longer run would have gone on.
        went_back = {rollback.at for rollback in log.rollbacks}
        decided: list[GoBack | None] = []
        for step, record in enumerate(log.records, start=1):
            decided.append(guard.stepped(math.nan if record.skipped else record.loss))
            for content in notes.get(step, ()):
                if "search" in content:
                    tried = {size: float(loss) for size, loss in content["search"]["tried"]}
                    self._count_search(guard, step, content["search"]["lr"], tried)
                if "held_out" in content:
                    self._measured = step
                    loss = float(content["held_out"])
                    is_last = step >= self._steps or step in went_back
                    decided.append(guard.measured(step, loss, is_last=is_last))
        return guard, [decision for decision in decided if decision is not None]

    def _watch_behind(self, lr: float) -> Guard:
        """The watch over the steps that follow those that were held and taken with this rate."""
        self._guard = self._new_guard(lr, self.plan.held)
        if self._untuned is not None:
            self._guard.known(0, self._untuned)
        return self._guard

    def _count_search(self, guard: Guard, step: int, lr: float, tried: dict[float, float]) -> None:
        """Let the guard know what a search measured, unless other examples are measured from now on."""
        if tried and self._measures:
            guard.known(0, tried[0.0])
            if lr in tried:
                guard.known(step, tried[lr])
                self._measured = step

    def _note_untuned(self, loss: float) -> None:
        if self._untuned is None:
            self._untuned = loss
            self._run.note({"held_out": plain(loss)})

    def _measure_if_due(self, step: int) -> None:
        planned = step >= self._steps or step % self.plan.every == 0
        if self._measures and planned and step > self._measured:
            self.measured(step, self._run.measure())

    def _follow(self, decision: GoBack | None, step: int, *, is_last: bool = False) -> None:
        if decision is None:
            return
        why = {"diverged": "the loss left its range", "worse": "worse than before"}[decision.why]
        is_last = is_last or step >= self._steps
        then = "where the run ends" if is_last else f"learning rate {decision.lr:.1e}"
        again = (decision.why, decision.step) == self._went_back and not is_last
        self._run.announce(
            f"{decision.why} again: {then}" if again else f"{why}: back to the weights of step {decision.step}, {then}"
        )
        self._went_back = decision.why, decision.step
        self._run.go_back(decision.step, decision.lr)


def first_rate(
    coefficients: Sequence[Sequence[float]], *, eps: float, momentum: float | None, otherwise: float
) -> float:
    """The learning rate with which a step of the size seen moves a weight by a set share of eps.

    Args:
        coefficients: those of the directions that each step is the mean of.
        eps: perturbation scale.
        momentum: of the rule, 0 without; None for a rule that moves a weight by about the learning rate itself.
        otherwise: what is returned where no step says anything, as all coefficients are 0.
    """
    unit = 1.0
    if momentum is not None:
        squares = (sum(c * c for c in step) / len(step) ** 2 for step in coefficients)
        unit = math.sqrt(sum(squares) / max(1, len(coefficients)))
        unit /= 1 - momentum
    guess = _MOVE * eps / unit if unit else 0.0
    return guess if 0 < guess < math.inf else otherwise


def rate_found(found: LineSearch) -> float:
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


def share_of(found: float, share: float, tried: Mapping[float, float]) -> float:
    """A share of a rate; as the search has it, where it tried that one."""
    wanted = found * share
    return next((size for size in tried if math.isclose(size, wanted, rel_tol=1e-9)), wanted)
