"""Estimators: coefficients by hand and by exact enumeration, units, gaps, and what a query costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO, StepLog, replay
from forwardtune.method.estimators import SPSA, Estimator, OneSided, Query, centred_ranks
from forwardtune.method.rules import sgd
from forwardtune.noise import Noise
from forwardtune.trajectory import export_trajectory, read_log
from support import assert_same_bits, scripted, snapshot, trusted
from support.methods import Point, Quadratic, every_perturbation


def exact_quadratic(
    size: int,
) -> tuple[Callable[[Sequence[Fraction]], float], list[int], list[Fraction], list[list[int]]]:
    """A loss whose values are float64 numbers exactly, a point, its gradient there, and the symmetric Hessian."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randint(-4, 5, (size, size), generator=draw)
    hessian = (root + root.t()).tolist()
    linear, theta = torch.randint(-4, 5, (2, size), generator=draw).tolist()

    def loss(point: Sequence[Fraction]) -> float:
        value = sum(Fraction(hessian[i][j]) * point[i] * point[j] for i in range(size) for j in range(size)) / 2
        value += sum(b * x for b, x in zip(linear, point, strict=True))
        assert Fraction(float(value)) == value
        return float(value)

    gradient = [
        Fraction(sum(h * x for h, x in zip(row, theta, strict=True)) + b)
        for row, b in zip(hessian, linear, strict=True)
    ]
    return loss, theta, gradient, hessian


@pytest.mark.parametrize("kind", [SPSA, OneSided])
def test_all_sign_vectors_together_give_the_exact_gradient(kind):
    """And sgd moves along it. One side alone is off by ``eps / 2 * z'Hz``, which z and -z share."""
    size, eps = 4, 2.0**-6
    signs = list(itertools.product((-1, 1), repeat=size))
    loss, theta, gradient, hessian = exact_quadratic(size)
    estimator = kind(eps, len(signs))
    losses = [
        loss([x + Fraction(query.scale) * z for x, z in zip(theta, signs[query.probe], strict=True)])
        for query in estimator.queries()
    ]
    coefficients = [Fraction(c) for c in estimator.coefficients(losses)]
    for c, z in zip(coefficients, signs, strict=True):
        along = sum(g * s for g, s in zip(gradient, z, strict=True))
        curvature = sum(hessian[i][j] * z[i] * z[j] for i in range(size) for j in range(size))
        assert c == along + (Fraction(eps) / 2 * curvature if kind is OneSided else 0)
    for i in range(size):
        assert sum(c * z[i] for c, z in zip(coefficients, signs, strict=True)) / len(signs) == gradient[i]
    if kind is SPSA:
        update = sgd(0, list(map(float, coefficients)), lr=2.0**-3)
        for i in range(size):
            assert sum(Fraction(c) * z[i] for c, z in zip(update.sizes, signs, strict=True)) == -gradient[i] / 8


def of_step(estimator: Estimator, losses: Sequence[float]) -> list[float]:
    """A step's coefficients."""
    return estimator.of_step(estimator.coefficients(losses))


def test_spread_is_the_plain_coefficient_over_the_root_mean_square_of_all():
    """Whatever the signs of directions are, which are arbitrary: the deviation around the mean depends on them."""
    losses = torch.tensor([0.3, 1.5, -0.2, 0.9, 2.5, 0.1, 0.7], dtype=torch.float64)
    for estimator, plain in (
        (OneSided(0.25, 6, "spread"), losses[1:] - losses[0]),
        (SPSA(0.25, 3, "spread"), losses[1::2] - losses[2::2]),
    ):
        given = losses.tolist() if estimator.name == "one_sided" else losses[1:].tolist()
        expected = plain / plain.square().mean().sqrt()
        assert of_step(estimator, given) == pytest.approx(expected.tolist(), rel=1e-14)
    turned = [*losses[1:5].tolist(), losses[6].item(), losses[5].item()]
    assert of_step(estimator, turned)[:2] == of_step(estimator, given)[:2]


def test_sigma_is_the_plain_coefficient_times_eps_over_the_deviation_of_the_losses():
    losses = [0.3, 1.5, -0.2, 0.9, 2.5, 0.1, 0.7]
    deviation = torch.tensor(losses[1:], dtype=torch.float64).std().item()
    plain, sigma = (OneSided(0.25, 6, normalize).coefficients(losses) for normalize in ("none", "sigma"))
    assert sigma == pytest.approx([c * 0.25 / deviation for c in plain], rel=1e-14)
    plain, sigma = (SPSA(0.25, 3, normalize).coefficients(losses[1:]) for normalize in ("none", "sigma"))
    assert sigma == pytest.approx([c * 0.25 / deviation for c in plain], rel=1e-14)


@pytest.mark.parametrize("kind", [SPSA, OneSided])
@pytest.mark.parametrize(
    ("normalize", "change"),
    [
        ("sigma", lambda loss: 8 * loss + 3),
        ("spread", lambda loss: 8 * loss + 3),
        ("rank", lambda loss: 8 * loss + 3),
        ("rank", lambda loss: math.exp(loss)),
    ],
    ids=["sigma-affine", "spread-affine", "rank-affine", "rank-monotonic"],
)
def test_the_unit_of_the_loss_does_not_matter(kind, normalize, change):
    estimator = kind(1e-3, 4, normalize)
    losses = [0.25, 1.5, -0.5, 0.75, 2.5, 0.125, 0.625, -1.5][: len(estimator.queries())]
    changed = of_step(estimator, [change(loss) for loss in losses])
    assert changed == pytest.approx(of_step(estimator, losses), rel=1e-12)
    assert any(changed)


def test_ranks_are_centred_and_ties_share_theirs():
    assert centred_ranks([3.0, 1.0, 2.0]) == [0.5, -0.5, 0.0]
    assert centred_ranks([1.0, 1.0, 2.0, 0.0, 2.0]) == [-0.125, -0.125, 0.375, -0.5, 0.375]
    assert SPSA(1e-3, 2, "rank").coefficients([4.0, 1.0, 2.0, 3.0]) == pytest.approx([0.5, -1 / 6])
    assert OneSided(1e-3, 3, "rank").coefficients([4.0, 1.0, 2.0]) == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("loss", [0.1, 0.0, 1e300])
@pytest.mark.parametrize("normalize", ["sigma", "rank", "spread"])
@pytest.mark.parametrize("kind", [SPSA, OneSided])
def test_losses_that_are_all_equal_have_no_slope(kind, normalize, loss):
    """0, not NaN; also where they differ from the loss at theta, as an accuracy may."""
    estimator = kind(1e-3, 5, normalize)
    losses = [loss] * len(estimator.queries())
    assert of_step(estimator, losses) == [0.0] * 5
    if (
        estimator.queries()[0].scale == 0 and normalize != "spread"
    ):  # which is of the differences from the loss at theta
        assert estimator.coefficients([0.25, *losses[1:]]) == [0.0] * 5


@pytest.mark.parametrize("kind", [SPSA, OneSided])
def test_losses_too_far_apart_for_a_deviation_are_skipped(kind):
    model = Quadratic()
    before = snapshot(model)
    optimizer = trusted(MeZO(model, estimator=kind(1e-3, 4, "sigma"), perturbation="copy"))
    optimizer.step(scripted(1e308, -1e308))
    assert optimizer.last.skipped
    assert_same_bits(model, before)


GAP = {  # estimator, losses with a gap, losses without the probe that it is in, place of that probe
    "spsa": (SPSA(0.5, 3), [1.0, 0.5, math.inf, 0.25, 3.0, 2.0], [1.0, 0.5, 3.0, 2.0], 1),
    "spsa, minus": (SPSA(0.5, 3), [1.0, 0.5, 0.25, 3.0, 2.0, math.nan], [1.0, 0.5, 0.25, 3.0], 2),
    "spsa, overflow": (SPSA(0.5, 2), [1e308, -1e308, 1.0, 0.5], [1.0, 0.5], 0),
    "sigma": (SPSA(0.5, 3, "sigma"), [1.0, 0.5, -math.inf, 0.25, 3.0, 2.0], [1.0, 0.5, 3.0, 2.0], 1),
    "spread": (SPSA(0.5, 3, "spread"), [1.0, 0.5, -math.inf, 0.25, 3.0, 2.0], [1.0, 0.5, 3.0, 2.0], 1),
    "rank": (SPSA(0.5, 3, "rank"), [math.nan, 0.5, 0.75, 0.25, 3.0, 2.0], [0.75, 0.25, 3.0, 2.0], 0),
    "one_sided": (OneSided(0.5, 3), [1.0, math.inf, 0.5, 0.25], [1.0, 0.5, 0.25], 0),
    "one_sided, sigma": (OneSided(0.5, 3, "sigma"), [1.0, 0.5, 0.25, math.inf], [1.0, 0.5, 0.25], 2),
    "one_sided, spread": (OneSided(0.5, 3, "spread"), [1.0, 0.5, 0.25, math.inf], [1.0, 0.5, 0.25], 2),
    "one_sided, rank": (OneSided(0.5, 3, "rank"), [0.5, math.nan, 0.25], [0.5, 0.25], 1),
}


@pytest.mark.parametrize("case", GAP)
def test_a_probe_without_finite_losses_is_left_out(case, tmp_path):
    """The step is that of the others alone; log, replay and export hold the gap."""
    estimator, losses, others, gap = GAP[case]
    fewer = type(estimator)(
        estimator.eps, estimator.probes - 1, estimator.normalize if estimator.probes > 2 else "none"
    )
    expected = of_step(fewer, others)
    expected.insert(gap, math.nan)
    assert repr(of_step(estimator, losses)) == repr(expected)

    model = Quadratic()
    optimizer = trusted(MeZO(model, lr=0.25, estimator=estimator, perturbation="copy", rule="adam"))
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(scripted(*losses))
    assert not optimizer.last.skipped
    assert optimizer.last.present == tuple(c for c in expected if not math.isnan(c))
    assert optimizer.last.loss == math.fsum(x for x in losses if math.isfinite(x)) / sum(map(math.isfinite, losses))
    (record,) = read_log(tmp_path / "steps.jsonl").records
    assert repr(record.coefficients) == repr(tuple(expected))
    export_trajectory(read_log(tmp_path / "steps.jsonl"), tmp_path / "run.safetensors")
    for source in ("steps.jsonl", "run.safetensors"):
        again = Quadratic()
        replay(tmp_path / source, again)
        assert_same_bits(again, snapshot(model))
        assert not torch.equal(again.flat.value, Quadratic().flat.value)


@pytest.mark.parametrize(
    "estimator",
    [
        SPSA(0.5, 2),
        OneSided(0.5, 2),
        SPSA(0.5, 2, "sigma"),
        OneSided(0.5, 2, "sigma"),
        OneSided(0.5, 2, "rank"),
        OneSided(0.5, 2, "spread"),
    ],
    ids=str,
)
def test_no_probe_left_skips_the_step(estimator):
    """Or too few for a normalisation; or the unperturbed loss, which all probes need, is gone."""
    count = len(estimator.queries())
    assert all(map(math.isnan, estimator.coefficients([math.inf] * count)))
    if estimator.normalize in ("sigma", "rank"):
        assert all(map(math.isnan, estimator.coefficients([*range(count - 1), math.nan])))
    if estimator.name == "one_sided" and estimator.normalize != "rank":
        assert all(map(math.isnan, estimator.coefficients([math.nan, *range(count - 1)])))


@pytest.mark.parametrize("probes", [2, 5])
def test_normalised_two_sided_coefficients_are_bounded(probes):
    losses = torch.randn(100, 2 * probes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    losses[:, 0] *= 1e6
    bounds = {"sigma": math.sqrt(probes - 0.5) * (1 + 1e-12), "rank": 0.5, "spread": math.sqrt(probes) * (1 + 1e-12)}
    for normalize, bound in bounds.items():
        estimator = SPSA(1e-3, probes, normalize)
        assert max(abs(c) for row in losses.tolist() for c in of_step(estimator, row)) <= bound


class CountedNoise(Noise):
    """Counts its sweeps."""

    def perturb(self, *args: Any, **kwargs: Any) -> None:
        calls.append(kwargs["scale"])
        super().perturb(*args, **kwargs)


calls: list[float] = []


@every_perturbation
def test_a_clean_query_costs_no_noise(perturbation, monkeypatch):
    """Wherever it stands in a step."""
    monkeypatch.setattr(OneSided, "queries", lambda self: [*SPSA(self.eps).queries(), Query(0, 0.0)])
    model = Quadratic()
    optimizer = trusted(MeZO(model, estimator=OneSided(), perturbation=perturbation))
    optimizer.perturbation.noise = CountedNoise(0)
    calls.clear()
    losses: list[float] = []
    optimizer.estimate(lambda: losses.append(float(model())) or losses[-1])
    assert sorted(calls) == [-1e-3, -1e-3, 1e-3, 1e-3]
    assert losses[2] == model().item() != losses[0]


def test_the_self_check_works_with_a_clean_query_first():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = Point(torch.zeros(3))
            self.kept = [self.point.value]

        def forward(self) -> Tensor:
            return (self.kept[0] - 1).square().sum()  # not through the module

    model = Quadratic()
    optimizer = MeZO(model, estimator="one_sided", probes=2)
    optimizer.step(model)
    assert optimizer.perturbation.name == "scratch"
    model = Outside()
    optimizer = MeZO(model, estimator="one_sided", probes=2)
    with pytest.warns(UserWarning, match="perturbation='scratch' cannot see"):
        optimizer.step(model)
    assert optimizer.evaluator.copied == {0}
