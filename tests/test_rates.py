"""The search as a state machine: no model, no file, no Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from forwardtune.errors import InputError
from forwardtune.search.budget import Plan
from forwardtune.search.guard import FALL, RISE, GivenRate, GoBack, Guard
from forwardtune.search.rates import RateSearch, first_rate

PLAN = Plan(held=4, batches=1, tries=7, every=5)
STEPS, TARGET, GRADIENT = 30, 3.0, -2.0
guess = partial(first_rate, eps=1e-2, momentum=0.0, otherwise=1e-6)


def loss_of(weight: float) -> float:
    return (weight - TARGET) ** 2


class Number:
    """A run whose one weight moves by ``rate * 2`` a step, towards where the loss is least. It notes what it does."""

    def __init__(
        self,
        plan: Plan = PLAN,
        steps: int = STEPS,
        *,
        measure: Callable[[int, float], float] = lambda step, weight: loss_of(weight),
        **settings: Any,
    ) -> None:
        self.search = RateSearch(plan, steps, self, guess, **settings)
        self._loss = measure
        self.weight, self.rate, self.step, self.held = 0.0, math.nan, 0, -1
        self.points = {0: 0.0}
        self.done: list[tuple[str, int, Any]] = []

    def run(self, steps: int = STEPS) -> Number:
        self.search.begin()
        for self.step in range(1, steps + 1):
            if self.held < 0:
                self.weight -= self.rate * GRADIENT
            else:
                self.held += 1
            self.search.stepped(self.step, loss_of(self.weight), (GRADIENT,))
        return self

    def all(self, kind: str) -> list[tuple[int, Any]]:
        return [(step, value) for name, step, value in self.done if name == kind]

    def hold(self) -> None:
        self.done.append(("hold", self.step, None))
        self.held = 0

    def try_rate(self, lr: float) -> float:
        self.done.append(("try", self.step, lr))
        return loss_of(self.weight - lr * GRADIENT * self.held)

    def take(self, lr: float) -> None:
        self.done.append(("take", self.step, lr))
        self.weight, self.held = self.weight - lr * GRADIENT * self.held, -1
        self.points[self.step] = self.weight

    def measure(self) -> float:
        self.done.append(("measure", self.step, None))
        self.points[self.step] = self.weight
        return self._loss(self.step, self.weight)

    def set_rate(self, lr: float) -> None:
        self.rate = lr

    def go_back(self, step: int, lr: float) -> None:
        self.done.append(("back", self.step, step))
        if step in self.points:
            self.weight, self.rate = self.points[step], lr

    def note(self, content: dict[str, Any]) -> None:
        self.done.append(("note", self.step, content))

    def announce(self, text: str) -> None:
        self.done.append(("announce", self.step, text))


def test_steps_are_held_then_tried_then_taken_with_the_best_rate() -> None:
    run = Number().run()
    assert run.done[0] == ("hold", 0, None)
    tried = {lr: loss_of(4 * 2 * lr) for _, lr in run.all("try")}
    ((at, taken),) = run.all("take")
    assert at == 4
    assert taken == min(tried, key=lambda lr: tried[lr])
    assert 0.0 in tried
    assert 3 <= len(tried) <= PLAN.tries
    search = next(content["search"] for _, content in run.all("note") if "search" in content)
    assert search == {"lr": taken, "tried": [[lr, loss] for lr, loss in tried.items()]}


def test_it_is_measured_every_so_many_steps_and_with_the_last() -> None:
    run = Number(steps=28).run(28)
    assert [step for step, _ in run.all("measure")] == [5, 10, 15, 20, 25, 28]
    assert [step for step, content in run.all("note") if "held_out" in content] == [5, 10, 15, 20, 25, 28]


def test_what_the_search_has_measured_is_not_measured_again() -> None:
    run = Number(Plan(held=4, batches=1, tries=7, every=2), 8).run(8)
    assert [step for step, _ in run.all("measure")] == [6, 8]


def test_steps_that_were_held_count_for_what_is_normal() -> None:
    """Eight losses say what is normal, the four held ones among them; eight more say that the run has diverged."""
    run = Number(Plan(held=4, batches=1, tries=0, every=100), 100, measures=False)
    for run.step, loss in enumerate([1.0, 1.1] * 4 + [9.0] * 8, start=1):
        run.search.stepped(run.step, loss, (1.0,))
    assert [step for step, _ in run.all("back")] == [16]


def test_where_every_loss_is_worse_the_run_ends_at_the_weights_that_it_took() -> None:
    run = Number(measure=lambda step, weight: 100.0 + step).run()
    assert run.all("back") == [(step, 4) for step in range(5, 31, 5)]
    assert run.weight == run.points[4]
    said = [text for _, text in run.all("announce")][1:]
    assert said[0].startswith("worse than before: back to the weights of step 4, learning rate ")
    assert {text.partition(":")[0] for text in said[1:-1]} == {"worse again"}
    assert said[-1] == "worse than before: back to the weights of step 4, where the run ends"


def test_somebody_else_may_measure() -> None:
    """Then nothing is asked for."""
    run = Number(measures=False)
    run.search.measured(0, 1.0)
    run.run(6)
    assert not run.all("measure")
    for step, loss in ((6, 0.5), (6, 0.5), (7, 2.0)):
        run.search.measured(step, loss)
    assert [content["held_out"] for _, content in run.all("note") if "held_out" in content] == [1.0, 0.5, 2.0]
    assert [step for _, step in run.all("back")] == [6]


def test_too_short_for_a_search() -> None:
    """The first guess is taken, and the untuned weights are measured, to go back to."""
    run = Number(Plan(held=1, batches=1, tries=2, every=1), 3).run(3)
    assert run.all("try") == [(1, 0.0)]
    assert run.all("note")[0] == (1, {"held_out": loss_of(0.0)})
    assert run.all("take") == [(1, pytest.approx(0.3 * 1e-2 / 2))]
    assert [step for step, _ in run.all("measure")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("coefficients", "settings", "expected"),
    [
        ([(2.0,), (-2.0,)], {}, 0.3 * 1e-2 / 2),
        ([(3.0, 4.0)], {}, 0.3 * 1e-2 / 2.5),
        ([(3.0, 4.0), (2.5,)], {}, 0.3 * 1e-2 / 2.5),  # of a short minibatch, or without a probe
        ([(2.0,)], {"momentum": 0.9}, 0.3 * 1e-2 / 20),
        ([(2.0,)], {"momentum": None}, 0.3 * 1e-2),
        ([(0.0,)], {}, 1e-6),
        ([], {}, 1e-6),
    ],
)
def test_a_step_of_the_first_rate_moves_a_weight_by_a_share_of_eps(
    coefficients: Any, settings: dict[str, Any], expected: float
) -> None:
    found = first_rate(coefficients, **{"eps": 1e-2, "momentum": 0.0, "otherwise": 1e-6, **settings})
    assert found == pytest.approx(expected)


def test_a_given_rate_is_warned_of_once() -> None:
    watch = GivenRate(1e-3)
    warnings = [watch.stepped(step, loss) for step, loss in enumerate([1.0, math.nan, 1.1, 30.0, 50.0], start=1)]
    assert [text is not None for text in warnings] == [False, False, False, True, False]
    assert "by step 4" in str(warnings[3])


def test_the_numbers_of_the_watch_are_the_guards() -> None:
    guard = Guard(1.0, rise=2.0, fall=4.0, slight=0.5)
    guard.known(0, 10.0)
    assert guard.measured(1, 8.0) is None
    assert guard.lr == 2.0
    assert guard.measured(2, 8.1) == GoBack(1, 1.0, "worse")  # hardly worse
    assert guard.measured(3, 20.0) == GoBack(1, 0.25, "worse")


def test_where_examples_have_directions_a_share_of_the_found_rate_is_taken() -> None:
    plan, usual = (Plan.of(100, 2, find_eps=False, per_example=per_example) for per_example in (True, False))
    assert (plan.share, plan.rise, plan.patience) == (pytest.approx(10**-0.5), 1.25, 2)
    assert Plan.read(plan.content()) == plan
    assert not {"share", "rise", "patience"} & usual.content().keys()
    part = Plan(held=4, batches=1, tries=7, every=5, share=10**-0.5, rise=1.25, patience=2)
    whole, run = Number(steps=4).run(4), Number(part, steps=4).run(4)
    (_, best), (_, taken) = whole.all("take")[0], run.all("take")[0]
    tried = [lr for _, lr in run.all("try")]
    assert taken in tried  # as the search has it, to the bit: its loss there is known
    assert taken == pytest.approx(best / 10**0.5)
    assert run.rate == taken
    # What was not tried is taken all the same, and measured when it is due.
    low = Number(Plan(held=4, batches=1, tries=3, every=5, share=0.01)).run(5)
    losses = dict(next(content["search"]["tried"] for _, content in low.all("note") if "search" in content))
    assert low.all("take")[0][1] == pytest.approx(0.01 * min(losses, key=lambda rate: losses[rate]))
    assert [step for step, _ in low.all("measure")] == [5]
    guessed = Number(Plan(held=4, batches=1, tries=0, every=9, share=0.1)).run(4)
    assert guessed.all("take")[0][1] == guess([(GRADIENT,)] * 4)  # there was no search


def test_a_run_of_an_earlier_version_is_not_gone_on_with() -> None:
    with pytest.raises(InputError, match="earlier version"):
        Plan.read(PLAN.content() | {"fall": 3.1})


def test_a_patient_run_goes_on_and_ends_at_its_best_point() -> None:
    """Losses rise by a thousandth each time: it goes on from where it is, more slowly, and goes back with the last step."""
    patient = Plan(held=4, batches=1, tries=0, every=5, patience=2)
    run = Number(patient, measure=lambda step, weight: 1.0 + step / 10000).run()
    assert run.all("back") == [(STEPS, 5)]
    assert run.weight == run.points[5]
    (_, taken), *_ = run.all("take")
    assert run.rate == pytest.approx(
        taken * RISE / FALL**2
    )  # better once, and hardly worse four times and with the last
    hasty = Number(replace(patient, patience=None), measure=lambda step, weight: 1.0 + step / 10000).run()
    assert hasty.all("back") == [(step, 5) for step in range(10, STEPS + 1, 5)]


def test_a_longer_run_knows_where_the_shorter_one_went_back() -> None:
    """Step 10 was the last of a patient run, which went back from a loss that was hardly worse. With more steps it went on, and was killed
    between the decision after step 20 and what follows from it."""
    patient = Plan(held=4, batches=1, tries=0, every=5, patience=2)
    measured = {0: 9.0, 5: 1.0, 10: 1.001, 15: 0.9, 20: 5.0}
    log: Any = SimpleNamespace(
        steps=20,
        records=[SimpleNamespace(lr=(0.1,), skipped=False, loss=1.0)] * 20,
        notes=[SimpleNamespace(at=step, content={"held_out": loss}) for step, loss in measured.items()],
        rollbacks=[SimpleNamespace(at=10, to=5)],
    )
    run = Number(patient, steps=30)
    run.search.resume(log)
    assert [value for _, value in run.all("back")] == [15]
