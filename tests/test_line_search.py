"""The search along a ray: on losses whose minimum is known, and on what real losses do beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from forwardtune.search.line_search import RATIO, LineSearch, line_search

START = 3e-6


class Loss:
    """A loss given on the grid ``START * RATIO^k``, which keeps count of its evaluations."""

    def __init__(self, on_grid: Callable[[int], float], at_zero: float) -> None:
        self._on_grid, self._at_zero = on_grid, at_zero
        self.asked: list[float] = []

    def __call__(self, size: float) -> float:
        self.asked.append(size)
        return self._on_grid(k_of(size)) if size else self._at_zero


def k_of(size: float) -> int:
    """The size's place on the grid, where it must lie."""
    k = round(math.log(size / START, RATIO))
    assert size == START * RATIO**k
    return k


def search(loss: Loss, most: int) -> LineSearch:
    """Search, and check what every search must keep."""
    found = line_search(loss, START, most=most)
    assert 3 <= len(found.tried) <= most
    assert list(found.tried) == loss.asked  # none twice
    assert found.tried[found.best] == min(found.tried.values())
    tried = sorted(k_of(size) for size in found.tried if size)
    assert tried == list(range(tried[0], tried[-1] + 1))  # a walk leaves nothing out
    return found


@pytest.mark.parametrize("minimum", range(-6, 7))
def test_it_finds_the_minimum_of_a_quadratic_in_log_size(minimum):
    loss = Loss(lambda k: 1 + (k - minimum - 0.2) ** 2 / 100, 2.0)
    found = search(loss, most=20)
    assert k_of(found.best) == minimum
    assert len(loss.asked) <= abs(minimum) + 4  # no detour


def test_the_best_of_few_evaluations_is_returned():
    """Three say no more than which way is down."""
    for minimum, best in ((5, 1), (1, 1), (0, 0), (-5, 0)):
        assert k_of(search(Loss(lambda k, m=minimum: (k - m) ** 2, 1e9), most=3).best) == best


def test_monotone_losses_are_followed_to_the_last_evaluation():
    falling, rising = Loss(lambda k: -float(k), 1e9), Loss(float, 1e9)
    assert k_of(search(falling, most=9).best) == 7
    assert k_of(search(rising, most=9).best) == -6
    assert [k_of(size) for size in falling.asked[1:]] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [k_of(size) for size in rising.asked[1:]] == [0, 1, -1, -2, -3, -4, -5, -6]


def test_a_flat_loss_gives_size_0():
    """No step is better than none, so none is taken."""
    loss = Loss(lambda k: 1.0, 1.0)
    assert search(loss, most=7).best == 0.0
    assert min(map(k_of, loss.asked[1:])) == -4


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_it_leaves_the_region_where_the_model_breaks(broken):
    """All large sizes give no number; a loss of minus infinity is no success either."""
    loss = Loss(lambda k: broken if k > -3 else 1 + (k + 4) ** 2 / 10, 2.0)
    found = search(loss, most=9)
    assert k_of(found.best) == -4
    assert found.tried[START] == math.inf


def test_a_first_step_up_that_breaks_turns_the_walk():
    loss = Loss(lambda k: math.nan if k > 0 else 1 + (k + 2) ** 2 / 10, 2.0)
    assert k_of(search(loss, most=9).best) == -2


@pytest.mark.parametrize("floor", [math.nan, math.inf])
def test_a_start_without_a_loss_is_worse_than_any(floor):
    assert k_of(search(Loss(lambda k: (k - 2) ** 2, floor), most=9).best) == 2


def test_nothing_finite_gives_size_0():
    assert search(Loss(lambda k: math.nan, math.nan), most=5).best == 0.0


def test_as_long_as_no_size_is_better_than_0_it_goes_down():
    """Broken models give losses that rise and fall by accident, as around k = 1 and k = -2 here."""
    high = {1: 8.0, 0: 9.0, -1: 7.0, -2: 9.0, -3: 8.0}
    loss = Loss(lambda k: high.get(k, 0.5 if k == -4 else 0.9), 1.0)
    assert k_of(search(loss, most=9).best) == -4
    assert search(Loss(lambda k: 2.0 - k / 100, 1.0), most=6).best == 0.0


def unimodal(rng: random.Random) -> tuple[Loss, int]:
    """A loss that falls strictly from size 0 to its minimum, and rises strictly after it, by steps of any size."""
    minimum = rng.randrange(-12, 13)
    losses = {minimum: 0.0}
    for side in (-1, 1):
        for k in range(minimum + side, side * 40, side):
            losses[k] = losses[k - side] + 10 ** rng.uniform(-3, 1)
    return Loss(losses.__getitem__, max(losses[k] for k in losses if k <= minimum) + 1e-3), minimum


def test_it_finds_the_minimum_of_any_unimodal_loss():
    rng = random.Random(0)
    for _ in range(500):
        loss, minimum = unimodal(rng)
        assert k_of(search(loss, most=40).best) == minimum


@pytest.mark.parametrize("most", range(3, 10))
def test_it_never_asks_more_than_it_may(most):
    """``search`` checks the count, and that nothing tried was better than what is returned."""
    rng = random.Random(most)
    for _ in range(200):
        loss, minimum = unimodal(rng)
        found = search(loss, most)
        if found.best and len(loss.asked) < most:
            assert k_of(found.best) == minimum  # it ends early only where it cannot gain
        rough = {k: rng.choice([rng.random(), math.nan, math.inf]) for k in range(-most, most + 1)}
        search(Loss(rough.__getitem__, rng.random()), most)


@pytest.mark.parametrize("start", [0.0, -1e-6, math.inf, math.nan])
def test_a_start_that_is_no_size_is_refused(start):
    with pytest.raises(ValueError, match="start must be positive"):
        line_search(lambda size: 0.0, start, most=5)


def test_two_evaluations_are_no_search():
    with pytest.raises(ValueError, match="3 evaluations or more"):
        line_search(lambda size: 0.0, 1.0, most=2)
