"""The search as a state machine: no model, no file, no Trainer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from forwardtune.search.budget import Plan
from forwardtune.search.decisions import Announce, GoBack, Hold, Measure, Note, SetRate, Take, Try
from forwardtune.search.guard import Guard
from forwardtune.search.rates import GivenRate, RateSearch, first_rate

PLAN = Plan(held=4, batches=1, tries=7, every=5)
STEPS, TARGET, GRADIENT = 30, 3.0, -2.0
guess = partial(first_rate, eps=1e-2, probes=1, momentum=0.0, otherwise=1e-6)


def loss_of(weight: float) -> float:
    return (weight - TARGET) ** 2


@dataclass
class Number:
    """A run whose one weight moves by ``rate * 2`` a step, towards where the loss is least; acts on every decision."""

    search: RateSearch
    measure: Callable[[int, float], float] = lambda step, weight: loss_of(weight)
    weight: float = 0.0
    rate: float = math.nan
    step: int = 0
    held: int | None = None
    points: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    decided: list[Any] = field(default_factory=list)

    def act(self, decisions: list[Any]) -> None:
        assert not any(isinstance(d, Try | Measure) for d in decisions[:-1]), "what wants a loss is the last"
        waiting = deque(decisions)
        while waiting:
            self.decided.append((self.step, waiting[0]))
            match waiting.popleft():
                case Hold():
                    self.held = 0
                case Try(lr):
                    held_out = loss_of(self.weight - lr * GRADIENT * (self.held or 0))
                    waiting.extend(self.search.tried(held_out))
                case Take(lr):
                    self.weight, self.held = self.weight - lr * GRADIENT * (self.held or 0), None
                    self.points[self.step] = self.weight
                case Measure():
                    self.points[self.step] = self.weight
                    waiting.extend(self.search.measured(self.step, self.measure(self.step, self.weight)))
                case SetRate(lr):
                    self.rate = lr
                case GoBack(step, lr):
                    self.weight, self.rate = self.points[step], lr

    def run(self, steps: int = STEPS) -> Number:
        self.act(self.search.begin())
        for self.step in range(1, steps + 1):
            if self.held is None:
                self.weight -= self.rate * GRADIENT
            else:
                self.held += 1
            self.act(self.search.stepped(self.step, loss_of(self.weight), (GRADIENT,)))
        return self

    def all(self, kind: type) -> list[tuple[int, Any]]:
        return [(step, decision) for step, decision in self.decided if isinstance(decision, kind)]


def test_steps_are_held_then_tried_then_taken_with_the_best_rate() -> None:
    run = Number(RateSearch(PLAN, STEPS, guess)).run()
    assert run.decided[0] == (0, Hold(4))
    tried = {decision.lr: loss_of(4 * 2 * decision.lr) for _, decision in run.all(Try)}
    ((at, take),) = run.all(Take)
    assert at == 4
    assert take.lr == min(tried, key=lambda lr: tried[lr])
    assert 0.0 in tried
    assert 3 <= len(tried) <= PLAN.tries
    search = next(d.content["search"] for _, d in run.all(Note) if "search" in d.content)
    assert search == {"lr": take.lr, "tried": [[lr, loss] for lr, loss in tried.items()]}


def test_it_is_measured_every_so_many_steps_and_with_the_last() -> None:
    run = Number(RateSearch(PLAN, 28, guess)).run(28)
    assert [step for step, _ in run.all(Measure)] == [5, 10, 15, 20, 25, 28]
    noted = [(step, d.content["held_out"]) for step, d in run.all(Note) if "held_out" in d.content]
    assert [step for step, _ in noted] == [5, 10, 15, 20, 25, 28]


def test_what_the_search_has_measured_is_not_measured_again() -> None:
    run = Number(RateSearch(Plan(held=4, batches=1, tries=7, every=2), 8, guess)).run(8)
    assert [step for step, _ in run.all(Measure)] == [6, 8]


def test_steps_that_were_held_count_for_what_is_normal() -> None:
    """Eight losses say what is normal, the four held ones among them; eight more say that the run has diverged."""
    search = RateSearch(Plan(held=4, batches=1, tries=0, every=100), 100, guess, measures=False)
    losses = [1.0, 1.1] * 4 + [9.0] * 8
    decided = [search.stepped(step, loss, (1.0,)) for step, loss in enumerate(losses, start=1)]
    backs = [step for step, decisions in enumerate(decided, start=1) for d in decisions if isinstance(d, GoBack)]
    assert backs == [16]


def test_where_every_loss_is_worse_the_run_ends_at_the_weights_that_it_took() -> None:
    run = Number(RateSearch(PLAN, STEPS, guess), measure=lambda step, weight: 100.0 + step).run()
    assert [(step, back.step, back.why) for step, back in run.all(GoBack)] == [(s, 4, "worse") for s in range(5, 31, 5)]
    assert run.weight == run.points[4]
    assert run.all(Announce)[-1][1].text == "worse than before: back to the weights of step 4, where the run ends"


def test_somebody_else_may_measure() -> None:
    """Then nothing is asked for."""
    search = RateSearch(PLAN, STEPS, guess, measures=False)
    run = Number(search)
    run.act(search.measured(0, 1.0))
    run.run(6)
    assert not run.all(Measure)
    assert Note({"held_out": 0.5}) in search.measured(6, 0.5)
    assert search.measured(6, 0.5) == []  # once
    (back,) = (decision for decision in search.measured(7, 2.0) if isinstance(decision, GoBack))
    assert (back.step, back.why) == (6, "worse")


def test_too_short_for_a_search() -> None:
    """The first guess is taken, and the untuned weights are measured, to go back to."""
    plan = Plan(held=1, batches=1, tries=2, every=1)
    run = Number(RateSearch(plan, 3, guess)).run(3)
    assert [decision for _, decision in run.all(Try)] == [Try(0.0)]
    assert run.all(Note)[0] == (1, Note({"held_out": loss_of(0.0)}))
    assert run.all(Take) == [(1, Take(pytest.approx(0.3 * 1e-2 / 2)))]
    assert [step for step, _ in run.all(Measure)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("coefficients", "settings", "expected"),
    [
        ([(2.0,), (-2.0,)], {}, 0.3 * 1e-2 / 2),
        ([(3.0, 4.0)], {"probes": 2}, 0.3 * 1e-2 / 2.5),
        ([(2.0,)], {"momentum": 0.9}, 0.3 * 1e-2 / 20),
        ([(2.0,)], {"momentum": None}, 0.3 * 1e-2),
        ([(0.0,)], {}, 1e-6),
        ([], {}, 1e-6),
    ],
)
def test_a_step_of_the_first_rate_moves_a_weight_by_a_share_of_eps(
    coefficients: Any, settings: dict[str, Any], expected: float
) -> None:
    found = first_rate(coefficients, **{"eps": 1e-2, "probes": 1, "momentum": 0.0, "otherwise": 1e-6, **settings})
    assert found == pytest.approx(expected)


def test_a_given_rate_is_warned_of_once() -> None:
    watch = GivenRate(1e-3)
    told = [watch.stepped(step, loss) for step, loss in enumerate([1.0, math.nan, 1.1, 30.0, 50.0], start=1)]
    assert [text is not None for text in told] == [False, False, False, True, False]
    assert "by step 4" in str(told[3])


def test_the_numbers_of_the_watch_are_the_guards() -> None:
    guard = Guard(1.0, rise=2.0, fall=4.0, slight=0.5)
    guard.known(0, 10.0)
    assert guard.measured(1, 8.0) is None
    assert guard.lr == 2.0
    assert guard.measured(2, 8.1) == GoBack(1, 1.0, "worse")  # hardly worse
    assert guard.measured(3, 20.0) == GoBack(1, 0.25, "worse")
