"""The watch over a run: when it goes back, to where, and when it had better not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest

from forwardtune.search.guard import FALL, PLUNGE, RISE, GoBack, Guard

LR = 1e-5
WINDOW = 8


def alarms(guard: Guard, losses: Iterable[float]) -> list[int]:
    """The steps, counted from 1, after which the guard went back."""
    return [step for step, loss in enumerate(losses, start=1) if guard.stepped(loss) is not None]


def normal(seed: int, mean: float = 0.7, deviation: float = 0.1) -> Iterator[float]:
    rng = random.Random(seed)
    while True:
        yield rng.gauss(mean, deviation)


def after(steps: int, losses: Iterator[float]) -> Guard:
    """A guard that heard so many of these losses."""
    guard = Guard(LR, best_step=3)
    for _ in range(steps):
        assert guard.stepped(next(losses)) is None
    return guard


@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.3, 1.0])
def test_noise_alone_is_hardly_ever_an_alarm(deviation):
    """200 runs of 500 steps in which nothing happens: at most one goes back."""
    runs = [alarms(Guard(LR), islice(normal(seed, 0.7, deviation), 500)) for seed in range(200)]
    assert sum(bool(run) for run in runs) <= 1


@pytest.mark.parametrize("quiet", [WINDOW, 30, 200])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, rng: rng.gauss(2.1, 0.3),
        lambda i, rng: 0.7 * 1.2**i + rng.gauss(0, 0.15),
        lambda i, rng: rng.gauss(8, 3),
        lambda i, rng: rng.choice([math.nan, 6.0]),
        lambda i, rng: 10.0 ** (25 * i),
    ],
    ids=["three times as high", "growing", "chaos", "half of it NaN", "overflow"],
)
def test_a_divergence_is_found_within_about_ten_steps(wrong, quiet):
    for seed in range(20):
        guard, rng = after(quiet, normal(seed, 0.7, 0.15)), random.Random(seed)
        (first, *_) = alarms(guard, (wrong(i, rng) for i in range(1, 13)))
        assert first <= 10


def test_a_divergence_leads_back_to_the_best_point_with_a_lower_rate():
    """Another alarm needs eight new losses: those that led to the first say nothing of the lower rate."""
    guard = after(20, normal(0))
    guard.known(20, 0.5)
    decisions = [guard.stepped(1.3) for _ in range(6)]
    assert [decision for decision in decisions if decision] == [GoBack(20, LR / PLUNGE, "diverged")]
    assert guard.lr == LR / PLUNGE == pytest.approx(LR / math.sqrt(10))
    guard = after(WINDOW, normal(0))  # before anything was measured it is the given step
    decisions = [guard.stepped(9.0) for _ in range(4 * WINDOW)]
    assert [d.step if d else None for d in decisions] == ([None] * (WINDOW - 1) + [3]) * 4
    assert guard.lr == pytest.approx(LR / 10**2)


def test_losses_of_a_divergence_do_not_blunt_the_watch():
    """What the variance is taken from is as quiet after a divergence as before."""
    losses = normal(0)
    guard = after(WINDOW, losses)
    assert alarms(guard, islice(normal(1, 8.0, 3.0), WINDOW)) == [WINDOW]
    assert alarms(guard, islice(losses, 30)) == []
    assert alarms(guard, islice(normal(2, 1.2, 0.1), 10))


@pytest.mark.parametrize(("share", "most"), [(0.2, 5), (0.35, 20), (0.5, 40)])
def test_losses_with_two_levels_are_seldom_an_alarm(share, most):
    """Of small minibatches with few classes. All of the first eight happen to be low; of the others, this share is high."""

    def losses(seed: int) -> Iterator[float]:
        rng = random.Random(seed)
        for step in range(200):
            yield rng.gauss(1.4 if step >= WINDOW and rng.random() < share else 0.75, 0.08)

    runs = [alarms(Guard(LR), losses(seed)) for seed in range(200)]
    assert sum(bool(run) for run in runs) <= most
    assert max(len(run) for run in runs) <= 3  # what raised an alarm counts for the variance, so they do not go on


@pytest.mark.parametrize("first", [0.2, -0.2, 4.0])
def test_a_tenth_is_a_tenth_of_the_first_losses(first):
    """Of losses without noise."""
    calm, beyond = Guard(LR), Guard(LR)
    steady = [first] * 2000  # the deviation that the change itself makes is then small
    assert not alarms(calm, steady + [first + 0.09 * abs(first)] * 2 * WINDOW)
    assert alarms(beyond, steady + [first + 0.12 * abs(first)] * 2 * WINDOW)


def skipping(share: float) -> Iterator[float]:
    rng = random.Random(0)
    return (math.nan if rng.random() < share else loss for loss in normal(0))


def falling(seed: int) -> Iterator[float]:
    noise = normal(seed, 0.0, 0.15)
    return (0.3 + 0.6 * 0.99**step + next(noise) for step in range(500))


@pytest.mark.parametrize(
    ("runs", "alarming"),
    [
        ([falling(seed) for seed in range(50)], False),
        ([[1.0] * 20 + [1.09] * 20], False),
        ([[1.0] * 20 + [1.2] * 10], True),
        ([[-1.0] * 20 + [-0.95] * 20 + [-3.0] * 20], False),  # as accuracies and rewards are
        ([[-1.0] * 20 + [-0.5] * 16], True),
        ([[loss] * 100 for loss in (0.0, 1.0, -1.0)], False),  # as of an accuracy that never changes
        ([islice(skipping(0.3), 300)], False),  # skipped steps
        ([[0.7, math.nan] * 20], False),  # between the first losses they do not add up
        ([[math.nan] * 50], False),  # what never gave a number cannot go back to one
    ],
)
def test_what_is_an_alarm(runs, alarming):
    assert all(bool(alarms(Guard(LR), losses)) == alarming for losses in runs)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_eight_losses_in_a_row_that_are_no_number_are_a_divergence(loss):
    assert alarms(after(20, normal(0)), [loss] * WINDOW) == [WINDOW]
    assert alarms(after(3, normal(0)), [loss] * WINDOW) == [WINDOW]  # even if hardly any was one before


def test_the_rate_rises_while_losses_fall():
    guard = Guard(LR)
    assert [guard.measured(step, 1 - step / 100) for step in (10, 20, 30)] == [None] * 3
    assert (guard.best_step, guard.best_loss, guard.lr) == (30, 0.7, pytest.approx(LR * RISE**3))


def test_a_higher_loss_leads_back_with_a_lower_rate():
    guard = Guard(LR)
    guard.measured(10, 0.5)
    decisions = [guard.measured(step, 0.6) for step in range(20, 50, 10)]
    assert [(d.step, d.why) for d in decisions] == [(10, "worse")] * 3
    assert [d.lr for d in decisions] == pytest.approx([LR * RISE / FALL**k for k in (1, 2, 3)])
    assert guard.measured(50, 0.4) is None
    assert (guard.best_step, guard.lr) == (50, pytest.approx(LR * RISE**2 / FALL**3))


@pytest.mark.parametrize("best", [0.5, -0.5])
def test_a_loss_that_is_hardly_higher_leads_back_with_the_same_rate(best):
    guard = Guard(LR)
    guard.known(0, best)
    assert guard.measured(10, best + 0.009) == GoBack(0, LR, "worse")
    assert guard.measured(20, best + 0.011) == GoBack(0, LR / FALL, "worse")


def test_two_percent_and_half_of_the_gain_are_still_slight():
    guard = Guard(LR)
    guard.known(0, 104.0)
    guard.known(10, 100.0)
    assert guard.measured(20, 102.0) == GoBack(10, LR, "worse")


def test_harm_as_large_as_the_gain_is_not_slight():
    """A large constant in the loss makes 2% of it large."""
    guard = Guard(LR)
    guard.known(0, 10.0)
    guard.measured(10, 9.96)
    assert guard.measured(20, 9.975).lr == pytest.approx(LR * RISE)
    assert guard.measured(30, 9.985).lr == pytest.approx(LR * RISE / FALL)


def test_an_equal_loss_changes_nothing():
    """As accuracies often are."""
    guard = Guard(LR)
    guard.measured(10, 0.5)
    before = repr(guard)
    assert [guard.measured(step, 0.5) for step in (20, 30)] == [None, None]
    assert repr(guard) == before


def test_a_loss_that_is_merely_known_leaves_the_rate():
    guard = Guard(LR, best_step=8)
    guard.known(0, 0.7)
    guard.known(8, 0.8)
    assert (guard.best_step, guard.best_loss, guard.lr) == (0, 0.7, LR)
    guard.known(9, 0.7)  # as good: the first one stays
    assert guard.best_step == 0
    assert guard.measured(10, 0.75) == GoBack(0, LR / FALL, "worse")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_is_worse(loss):
    guard = Guard(LR)
    guard.known(5, 0.5)
    assert guard.measured(10, loss) == GoBack(5, LR / FALL, "worse")
    assert guard.best_loss == 0.5


def test_going_back_clears_the_window_of_both_kinds():
    """A worse measurement in the middle of a divergence: its losses are of weights that are gone."""
    guard = after(20, normal(0))
    guard.stepped(2.0)
    guard.measured(21, 0.5)
    assert guard.measured(22, 0.6).why == "worse"
    assert alarms(guard, [9.0] * (WINDOW - 1)) == []
    assert alarms(guard, [9.0]) == [1]


def test_a_guard_that_is_told_the_same_decides_the_same():
    """At every point of a course with everything in it, a new guard that hears the history is the old one."""
    rng, told, decisions, guard = random.Random(3), [], [], Guard(LR, best_step=WINDOW)
    for step in range(1, 301):
        mean = 5.0 if step % 100 in range(50, 62) else 0.7
        told.append(("stepped", (math.nan if rng.random() < 0.05 else rng.gauss(mean, 0.1),)))
        if step % 20 == 0:
            told.append(("measured", (step, rng.choice([math.nan, rng.random()]))))
        while len(decisions) < len(told):
            name, values = told[len(decisions)]
            decisions.append(getattr(guard, name)(*values))
        if step % 25 == 0:
            again = Guard(LR, best_step=WINDOW)
            assert [getattr(again, name)(*values) for name, values in told] == decisions
            assert repr(again) == repr(guard)
    assert {decision.why for decision in decisions if decision} == {"diverged", "worse"}


def test_a_patient_watch_goes_on_where_a_loss_is_hardly_worse() -> None:
    guard = Guard(LR, patience=2, rise=1.25)
    guard.known(0, 2.0)
    assert guard.measured(10, 1.0) is None
    rate = guard.lr
    assert rate == LR * 1.25
    assert [guard.measured(step, 1.01) for step in (20, 30, 40)] == [None] * 3
    assert guard.lr == pytest.approx(rate / FALL)  # after the second, and one more counts towards the next
    assert guard.measured(50, 0.99) is None
    assert (guard.best_step, guard.lr) == (50, pytest.approx(rate / FALL * 1.25))
    assert guard.measured(60, 1.0) is None  # the one before 50 does not count any more
    assert guard.lr == pytest.approx(rate / FALL * 1.25)
    back = guard.measured(70, 1.5)  # clearly worse
    assert back == GoBack(50, pytest.approx(rate / FALL * 1.25 / FALL), "worse")
    assert guard.measured(80, 1.0) is None
    assert guard.measured(90, 1.0, is_last=True) == GoBack(50, guard.lr, "worse")
