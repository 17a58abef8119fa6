"""L0: a run that finds its learning rate, as a state machine: events go in, decisions come out, and others act on them.

A run

1. estimates its first steps at the base weights and holds them back;
2. takes all of them with the learning rate that is best on held-out examples, found by a line search, and goes on with it;
3. lets the rate rise while held-out losses fall, and goes back to its best point with another one when they do not, or when
   it diverges (:mod:`.guard`). The last step is measured too, so what is kept is the best point that was measured.

Nothing here knows of weights, files or a Trainer: :mod:`.driver` acts on the decisions in a run, ``benchmarks/rates.py`` in a
simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from .budget import Plan
from .decisions import Announce, Decision, GoBack, Hold, Measure, Note, SetRate, Take, Try
from .guard import SLIGHT, Guard
from .line_search import LineSearch, search

if TYPE_CHECKING:
    from ..trajectory import Log

# A step moves a weight by this share of eps, root mean square: what the search begins with. Good runs lie within a factor of ten.
_MOVE = 0.3
# A given learning rate is too large when a loss of the first steps, before losses have a history, is so many times the first.
_EARLY, _EXPLODED = 8, 10.0


class RateSearch:
    """The learning rate of one run.

    Every event returns the decisions that follow from it, in the order in which to act on them. One that wants a loss back is
    the last of its list. The state follows from the steps and notes of the run's log, so a resumed run goes on as if nothing
    had happened.

    Args:
        plan: how many steps are held, and how much is measured.
        steps: steps of the whole run.
        first_rate: the rate that the search begins with, from the coefficients of the held steps that were not skipped.
        measures: whether the run measures held-out examples as planned; else :meth:`measured` is called by someone who does.
        guard: makes the watch over the losses, from the rate and the step to go back to at first.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int,
        first_rate: Callable[[list[Sequence[float]]], float],
        *,
        measures: bool = True,
        guard: Callable[[float, int], Guard] = Guard,
    ) -> None:
        self.plan = plan
        self._steps, self._first_rate, self._measures, self._new_guard = steps, first_rate, measures, guard
        self._guard: Guard | None = None
        self._walk: Generator[float, float, LineSearch] | None = None
        self._held: list[tuple[float, Sequence[float]]] = []
        self._measured = -1
        self._untuned: float | None = None

    # --- events ------------------------------------------------------------------------------------------------------

    def begin(self) -> list[Decision]:
        """The run begins."""
        return [Hold(self.plan.held)]

    def stepped(self, step: int, loss: float, coefficients: Sequence[float]) -> list[Decision]:
        """A step was estimated and held, or was taken.

        Args:
            step: number of steps since the run began, this one included.
            loss: of its minibatch; not finite if the step was skipped.
            coefficients: empty if the step was skipped.
        """
        if self._guard is not None:
            return [*self._went_back(self._guard.stepped(loss), step), *self._due(step)]
        self._held.append((loss, coefficients))
        if len(self._held) < self.plan.held:
            return []
        if self.plan.searches:
            self._walk = search(self._guess(), most=self.plan.tries)
            return [Try(next(self._walk))]
        # No search, but a point to go back to.
        return [Try(0.0)] if self._measures else self._chosen(self._guess(), {})

    def tried(self, loss: float) -> list[Decision]:
        """The held-out loss that was wanted by :class:`Try`."""
        if self._walk is None:
            return [*self._note_untuned(loss), *self._chosen(self._guess(), {})]
        try:
            return [Try(self._walk.send(loss))]
        except StopIteration as end:
            return self._chosen(rate_found(end.value), end.value.tried)

    def measured(self, step: int, loss: float) -> list[Decision]:
        """The held-out loss after a step was measured, lower is better; after step 0 that of the untuned model."""
        decisions = self._note_untuned(loss) if step == 0 else []
        if self._guard is None or step <= self._measured:
            return decisions
        self._measured = step
        before = self._guard.lr
        decisions += [Note({"held_out": plain(loss)}), *self._went_back(self._guard.measured(step, loss), step)]
        return decisions if self._guard.lr == before else [*decisions, SetRate(self._guard.lr)]

    def resume(self, log: Log) -> list[Decision]:
        """The run goes on after the last step of its log."""
        heard = (note.content["held_out"] for note in log.notes if note.at == 0 and "held_out" in note.content)
        self._untuned = next(map(float, heard), None)
        if log.steps == 0:
            return self.begin()
        decided = self._recall(log)
        assert self._guard is not None
        now: list[Decision] = [SetRate(self._guard.lr)]
        if len(decided) > len(log.rollbacks):  # a kill came between a decision and what followed from it
            return now + self._went_back(decided[-1], log.steps)
        return now + self._due(log.steps)  # or between a step and its measurement

    # --- what follows ------------------------------------------------------------------------------------------------

    def _recall(self, log: Log) -> list[GoBack]:
        """Give a new guard all that the old one was given; returns the ways back that it decides."""
        notes: dict[int, list[dict[str, Any]]] = {}
        for note in log.notes:
            notes.setdefault(note.at, []).append(note.content)
        guard = self._watch(log.records[self.plan.held - 1].lr[0], self.plan.held)
        decided: list[GoBack | None] = []
        for step, record in enumerate(log.records, start=1):
            decided.append(guard.stepped(math.nan if record.skipped else record.loss))
            for content in notes.get(step, ()):
                if "search" in content:
                    tried = {size: float(loss) for size, loss in content["search"]["tried"]}
                    self._count_search(step, content["search"]["lr"], tried)
                if "held_out" in content:
                    self._measured = step
                    decided.append(guard.measured(step, float(content["held_out"])))
        return [decision for decision in decided if decision is not None]

    def _guess(self) -> float:
        return self._first_rate([coefficients for _, coefficients in self._held if coefficients])

    def _chosen(self, lr: float, tried: dict[float, float]) -> list[Decision]:
        """Take the steps that were held back, and watch those that follow."""
        shown = ", ".join(f"{size:.1e}: {loss:.4f}" for size, loss in sorted(tried.items()))
        unsearched = f", a guess: a run of {self._steps} steps is too short for a search"
        told = f"learning rate {lr:.1e}" + (f"; losses of held-out examples: {shown}" if shown else unsearched)
        held, self._held, self._walk = self._held, [], None
        guard = self._watch(lr, len(held))
        for loss, _ in held:
            guard.stepped(loss)
        self._count_search(len(held), lr, tried)
        note = {"search": {"lr": lr, "tried": [[size, plain(loss)] for size, loss in tried.items()]}}
        return [Take(lr), Note(note), Announce(told), SetRate(lr), *self._due(len(held))]

    def _watch(self, lr: float, held: int) -> Guard:
        self._guard = self._new_guard(lr, held)
        if self._untuned is not None:
            self._guard.known(0, self._untuned)
        return self._guard

    def _count_search(self, step: int, lr: float, tried: dict[float, float]) -> None:
        """Let the guard know what a search measured, unless other examples are measured from now on."""
        if tried and self._measures and self._guard is not None:
            self._guard.known(0, tried[0.0])
            self._guard.known(step, tried[lr])
            self._measured = step

    def _note_untuned(self, loss: float) -> list[Decision]:
        if self._untuned is not None:
            return []
        self._untuned = loss
        return [Note({"held_out": plain(loss)})]

    def _due(self, step: int) -> list[Decision]:
        """The measurement that comes after this step."""
        planned = step >= self._steps or step % self.plan.every == 0
        return [Measure()] if self._measures and planned and step > self._measured else []

    def _went_back(self, decision: GoBack | None, step: int) -> list[Decision]:
        if decision is None:
            return []
        why = {"diverged": "the loss left its range", "worse": "worse than before"}[decision.why]
        then = "where the run ends" if step >= self._steps else f"learning rate {decision.lr:.1e}"
        return [Announce(f"{why}: back to the weights of step {decision.step}, {then}"), decision]


class GivenRate:
    """The watch over a learning rate that the user gave: it warns, once, when the run diverges.

    Args:
        lr: the rate.
    """

    def __init__(self, lr: float) -> None:
        self._guard: Guard | None = Guard(lr)
        self._first: float | None = None

    def stepped(self, step: int, loss: float) -> str | None:
        """A step was taken; the arguments are those of :meth:`RateSearch.stepped`. Returns the warning."""
        if self._guard is None:
            return None
        if self._first is None and math.isfinite(loss):
            self._first = loss
        early = step <= _EARLY and self._first is not None and loss > _EXPLODED * max(1.0, abs(self._first))
        if self._guard.stepped(loss) is None and not early:
            return None
        self._guard = None
        return (
            f"the loss has left its range by step {step}: lower the learning rate, or let it be found (auto), which also goes "
            "back when that happens"
        )


def first_rate(
    coefficients: Sequence[Sequence[float]], *, eps: float, probes: int, momentum: float | None, otherwise: float
) -> float:
    """The learning rate with which a step of the size seen moves a weight by a set share of eps.

    Args:
        coefficients: one list a step.
        eps: perturbation scale.
        probes: directions a step.
        momentum: of the rule, 0 without; None for a rule that moves a weight by about the learning rate itself.
        otherwise: what is returned where no step says anything, as all coefficients are 0.
    """
    unit = 1.0
    if momentum is not None:
        unit = math.sqrt(sum(c * c for step in coefficients for c in step) / max(1, len(coefficients))) / probes
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


def plain(x: float) -> float | str:
    """As JSON can hold it."""
    return x if math.isfinite(x) else str(x)
