"""One suite for every way to combine a direction, a perturbation, an estimator and a rule.

A new member of an axis is one line in a table below, and must pass all of it.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO, StepLog, noise, replay
from forwardtune.method.estimators import SPSA, Estimator, OneSided, Query, centred_ranks
from forwardtune.method.rule import History, Rule, float32, move_all
from forwardtune.method.rules import SGD, Adam, Momentum, Muon, Sign, get_rule, nearest_root, sgd
from forwardtune.noise import ROUNDING_PROBE, Noise, Update, definition
from forwardtune.noise.philox import half_words
from forwardtune.parameters import TunedParameters
from forwardtune.trajectory import LogError, export_trajectory, read_log
from forwardtune.trajectory.export import read_trajectory
from forwardtune.trajectory.log import cut_log
from support import DTYPES, HALF, assert_same_bits, same_bits, scripted, snapshot, train, trusted
from support.logs import log_lines

# --- the tables ------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """An estimator and what it costs."""

    estimator: Callable[[float], Estimator]  # eps -> estimator
    evaluations: int


DIRECTIONS = ("gaussian", "rademacher")
PERTURBATIONS = ("scratch", "copy")
METHODS = {
    "spsa": Method(lambda eps: SPSA(eps), 2),
    "spsa-4": Method(lambda eps: SPSA(eps, 4), 8),
    "spsa-4-sigma": Method(lambda eps: SPSA(eps, 4, "sigma"), 8),
    "spsa-4-rank": Method(lambda eps: SPSA(eps, 4, "rank"), 8),
    "spsa-4-spread": Method(lambda eps: SPSA(eps, 4, "spread"), 8),
    "one_sided-4": Method(lambda eps: OneSided(eps, 4), 5),
    "one_sided-4-sigma": Method(lambda eps: OneSided(eps, 4, "sigma"), 5),
    "one_sided-4-rank": Method(lambda eps: OneSided(eps, 4, "rank"), 4),
    "one_sided-4-spread": Method(lambda eps: OneSided(eps, 4, "spread"), 5),
}
# Short windows, so that steps fall out of them in short runs.
RULES: dict[str, Rule] = {
    "sgd": SGD(),
    "sign": Sign(),
    "momentum-exact": Momentum(0.5, state="exact"),
    "momentum-window": Momentum(0.5, window=3),
    "adam-exact": Adam(0.5, 0.75, state="exact"),
    "adam-window": Adam(0.5, 0.75, window=3),
}
WITH_MOMENTS = {name: rule for name, rule in RULES.items() if rule.remembers}

every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_perturbation = pytest.mark.parametrize("perturbation", PERTURBATIONS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_rule_with_moments = pytest.mark.parametrize("rule", WITH_MOMENTS.values(), ids=WITH_MOMENTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Point(nn.Module):
    """A tensor, read through the module that owns it; its distance to 1."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value.double() - 1


class Quadratic(nn.Module):
    """``L = 1/2 |theta - 1|^2`` from theta = 0, over two tensors of 4 and 3 weights, one of them not contiguous."""

    SIZE = 7

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.flat = Point(torch.zeros(3, dtype=dtype))
        self.turned = Point(torch.zeros(2, 2, dtype=dtype).t())

    def forward(self) -> Tensor:
        # float64, so that differences of losses are exact to 1e-16.
        return sum(0.5 * part().square().sum() for part in (self.flat, self.turned))  # type: ignore[return-value]

    def groups(self) -> list[dict[str, Any]]:
        """Learning rates and decays of their own."""
        return [
            {"params": list(self.flat.parameters()), "lr": 2e-2, "weight_decay": 0.5},
            {"params": list(self.turned.parameters())},
        ]


def eventful(
    dtype: torch.dtype, direction: str, perturbation: str, method: Method, rule: Rule
) -> tuple[Quadratic, MeZO]:
    model = Quadratic(dtype)
    optimizer = MeZO(
        model.groups(), lr=1e-2, module=model, direction=direction, perturbation=perturbation, seed=2**40 + 1,
        estimator=method.estimator(0.125), rule=rule,
    )  # fmt: skip
    return model, optimizer


STEPS, SKIPPED, FLAT = 8, 2, 4


def take_steps(model: nn.Module, optimizer: MeZO, upto: int = STEPS) -> None:
    """To this step; on the way one is skipped, one is flat and learning rates change."""
    while optimizer.next_step < upto:
        at = optimizer.next_step
        optimizer.param_groups[0]["lr"] = 2e-2 / (1 + at)
        optimizer.step({SKIPPED: lambda: math.nan, FLAT: lambda: 1.0}.get(at, model))


# --- every combination -----------------------------------------------------------------------------------------------


@every_direction
@every_perturbation
@every_method
@every_rule
def test_it_evaluates_as_often_as_it_says_and_leaves_the_weights_alone(direction, perturbation, method, rule):
    model, optimizer = eventful(torch.float32, direction, perturbation, method, rule)
    take_steps(model, optimizer, 2)
    before, calls = snapshot(model), itertools.count()
    parameters = list(model.parameters())
    optimizer.estimate(lambda: (next(calls), model())[1])
    assert next(calls) == method.evaluations == len(optimizer.estimator.queries())
    assert_same_bits(model, before)

    for at in range(method.evaluations):
        calls = itertools.count()

        def failing(calls: Iterator[int] = calls, at: int = at) -> Tensor:
            loss = model()
            if next(calls) == at:
                raise ZeroDivisionError
            return loss

        with pytest.raises(ZeroDivisionError):
            optimizer.estimate(failing)
        assert_same_bits(model, before)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.next_step == 2


@pytest.mark.parametrize(("direction", "perturbation"), list(zip(DIRECTIONS, PERTURBATIONS, strict=True)))
@every_method
@every_rule
def test_replayed_resumed_and_restored_runs_have_the_same_bits(direction, perturbation, method, rule, tmp_path):
    """Of runs cut where the window is full, not full, and behind a skipped step.

    Both perturbations evaluate the same point, and weights see of an estimator nothing but its coefficients: so not each
    is crossed with each, and all dtypes are run for one estimator.
    """
    for dtype in DTYPES if method is METHODS["spsa-4"] else [torch.bfloat16]:
        path = tmp_path / str(dtype) / "steps.jsonl"
        model, optimizer = eventful(dtype, direction, perturbation, method, rule)
        states, each = {}, [snapshot(model)]
        with StepLog(path, optimizer):
            for at in range(1, STEPS + 1):
                take_steps(model, optimizer, at)
                each.append(snapshot(model))
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                states[at] = file
        log, final = read_log(path), snapshot(model)
        assert [record.skipped for record in log.records] == [at == SKIPPED for at in range(STEPS)]
        assert [record.flat for record in log.records] == [at == FLAT for at in range(STEPS)]
        assert not same_bits(final["flat.value"], torch.zeros(3, dtype=dtype))

        exported = path.with_suffix(".safetensors")
        export_trajectory(log, exported)
        for source in (path, exported):
            for steps, weights in [*enumerate(each), (None, final)]:
                base = Quadratic(dtype)
                assert replay(source, base, steps=steps) == (STEPS if steps is None else steps)
                assert_same_bits(base, weights)

        for at in (1, 3, 6):
            states[at].seek(0)
            saved = torch.load(states[at], weights_only=True)
            restored, other = eventful(dtype, direction, perturbation, method, rule)
            for group in other.param_groups:
                group["lr"] = 0.5  # the saved learning rate wins
            restored.load_state_dict(saved["model"])
            other.load_state_dict(saved["optimizer"])
            take_steps(restored, other)
            assert_same_bits(restored, final)

            short = path.with_name(f"{at}.jsonl")
            short.write_bytes(path.read_bytes())
            cut_log(read_log(short), at)
            resumed, other = eventful(dtype, direction, perturbation, method, rule)
            with StepLog.resume(short, other):
                assert_same_bits(resumed, saved["model"])
                take_steps(resumed, other)
            assert_same_bits(resumed, final)


class Layered(nn.Module):
    """As :class:`Quadratic`, of three layers and a tensor outside of them; one of them is not contiguous."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.linspace(-0.5, 0.5, 12, dtype=dtype)
        self.layers = nn.ModuleList(
            Point(values.view(*shape).clone() if shape[0] < 4 else values.view(3, 4).t())
            for shape in ((3, 4), (2, 6), (4, 3))
        )
        self.outside = Point(values[:5].clone())

    def forward(self) -> Tensor:
        return sum(0.5 * part().square().sum() for part in (*self.layers, self.outside))  # type: ignore[return-value]


#: Where directions fall, and the rules that can move weights so; and the rule that needs them to be of low rank.
WEIGHTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "layers": ({"active_layers": 2}, list(RULES)),
    "sparse": ({"sparsity": 0.5}, ["sgd"]),
    "variance": ({"modify": "variance"}, list(RULES)),
    "expectation": ({"modify": "expectation"}, list(RULES)),
    "gradients": ({"modify": "variance", "modify_by": "gradients"}, ["sgd", "adam-window"]),
    "muon": ({"rank": 1, "refresh": 3}, ["muon"]),
    "all, low-rank": ({"active_layers": 1, "sparsity": 0.25, "modify": "variance", "rank": 1, "refresh": 2}, ["sgd"]),
}


@pytest.mark.parametrize(("direction", "perturbation"), list(zip(DIRECTIONS, PERTURBATIONS, strict=True)))
@pytest.mark.parametrize(
    ("settings", "rule"),
    [(settings, RULES.get(rule, Muon(0.5, window=3))) for settings, rules in WEIGHTINGS.values() for rule in rules],
    ids=[f"{name}-{rule}" for name, (_, rules) in WEIGHTINGS.items() for rule in rules],
)
def test_wherever_directions_fall_runs_are_replayed_resumed_and_restored(
    settings, rule, direction, perturbation, tmp_path
):
    for dtype in DTYPES if isinstance(rule, (SGD, Muon)) else [torch.bfloat16]:

        def begun(dtype: torch.dtype = dtype) -> tuple[Layered, MeZO]:
            model = Layered(dtype)
            groups = [
                {"params": list(model.layers.parameters()), "lr": 2e-2, "weight_decay": 0.5},
                {"params": list(model.outside.parameters())},
            ]
            return model, MeZO(
                groups, lr=1e-2, module=model, direction=direction, perturbation=perturbation, seed=5,
                estimator=SPSA(0.125, 1 if isinstance(rule, Muon) else 2), rule=rule, **settings,
            )  # fmt: skip

        path = tmp_path / str(dtype) / "steps.jsonl"
        model, optimizer = begun()
        if optimizer.lacks_layers:
            optimizer.measure_layers(model)
        states, each = {}, [snapshot(model)]
        with StepLog(path, optimizer):
            for at in range(1, STEPS + 1):
                before = snapshot(model)
                take_steps(model, optimizer, at)
                each.append(snapshot(model))
                states[at] = io.BytesIO()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, states[at])
                if "sparsity" in settings and at - 1 != SKIPPED:
                    for name, was in before.items():
                        limit = optimizer.noise.emphasis.limits[sorted(before).index(name)]
                        assert limit is None or same_bits(each[-1][name][was.abs() > limit], was[was.abs() > limit])
        final = snapshot(model)
        export_trajectory(read_log(path), path.with_suffix(".safetensors"))
        for source in (path, path.with_suffix(".safetensors")):
            for steps in (None, 3, STEPS):
                base = Layered(dtype)
                replay(source, base, steps=steps)
                assert_same_bits(base, final if steps is None else each[steps])
        for at in (3, 6):
            states[at].seek(0)
            saved = torch.load(states[at], weights_only=True)
            restored, other = begun()
            restored.load_state_dict(saved["model"])
            other.load_state_dict(saved["optimizer"])
            take_steps(restored, other)
            assert_same_bits(restored, final)
            short = path.with_name(f"{at}.jsonl")
            short.write_bytes(path.read_bytes())
            cut_log(read_log(short), at)
            resumed, other = begun()
            with StepLog.resume(short, other):
                take_steps(resumed, other)
            assert_same_bits(resumed, final)


def test_the_number_of_probes_rises_as_in_the_paper(tmp_path):
    """``max(1, int(t / T n))`` of them in step t; from step T on, n."""
    counts = [1, 1, 1, 2, 2, 3, 4, 4]
    model = Layered(torch.bfloat16)

    def begun(model: nn.Module) -> MeZO:
        return MeZO(model, lr=1e-2, eps=0.125, probes=4, probes_rise=6, seed=5, rule=RULES["adam-window"])

    optimizer = begun(model)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for step in range(8):
            calls = itertools.count()
            optimizer.estimate(lambda calls=calls: (next(calls), model())[1])
            optimizer.step()
            assert len(optimizer.last.coefficients) == counts[step] == max(1, min(4, int(step / 6 * 4)))
            assert step == 0 or next(calls) == 2 * counts[step]  # the first step checks itself
            if step == 2:
                short = tmp_path / "short.jsonl"
                short.write_bytes((tmp_path / "steps.jsonl").read_bytes())
    plain = Layered(torch.bfloat16)  # a step of so many probes is one of a run with as many
    one = MeZO(plain, lr=1e-2, eps=0.125, seed=5, rule=RULES["adam-window"])
    one.step(plain)
    assert one.last.coefficients == read_log(short).records[0].coefficients
    ended = tmp_path / "ended.jsonl"
    ended.write_bytes(short.read_bytes())
    with StepLog.resume(ended, begun(Layered(torch.bfloat16))):
        pass  # a run that ends before it has had so many probes as the header says
    for log, steps in ((tmp_path / "steps.jsonl", 8), (ended, 3)):
        export_trajectory(read_log(log), log.with_suffix(".safetensors"))
        base, again = Layered(torch.bfloat16), Layered(torch.bfloat16)
        assert replay(log, base) == replay(log.with_suffix(".safetensors"), again) == steps
        assert_same_bits(base, snapshot(again))
    resumed = Layered(torch.bfloat16)
    optimizer = begun(resumed)
    with StepLog.resume(short, optimizer):
        for _ in range(5):
            optimizer.step(resumed)
    assert_same_bits(resumed, snapshot(model))
    with pytest.raises(ValueError, match="probes_rise must be a number of steps"):
        MeZO(resumed, probes_rise=-1)
    with pytest.raises(ValueError, match="use assignment='shared'"):
        MeZO(resumed, probes_rise=5, probes=2, normalize="rank")


# --- convergence -----------------------------------------------------------------------------------------------------


def expected_loss(steps: int, lr: float, mu: float, kappa: float) -> float:
    """L after so many steps over L at the start, in expectation, for ``m <- mu m + G e``, ``e <- e - lr m``.

    e = theta - target is the gradient, G = mean_k z_k z_k' has E[G] = I and E[G^2] = kappa I. The second moments
    A = E|e|^2, B = E[e.m] and C = E|m|^2 then follow a linear recursion.
    """
    a, b, c = 1.0, 0.0, 0.0
    for _ in range(steps):
        em = mu * b + a
        c = mu * mu * c + 2 * mu * b + kappa * a
        a, b = a - 2 * lr * em + lr * lr * c, em - lr * c
    return a


@pytest.mark.parametrize(("direction", "dtype"), [("gaussian", torch.float32), ("rademacher", torch.bfloat16)], ids=str)
@every_rule
@every_method
def test_it_converges_on_a_quadratic(direction, rule, method, dtype):
    """Its bound is derived: exactly where theta moves linearly in g, from the length of a step where that is fixed.

    Only one perturbation: both evaluate the same point (test_perturbation.py).
    """
    steps, size = 150, Quadratic.SIZE
    half = dtype == torch.bfloat16
    eps = 0.125 if half else 1e-3  # well above the spacing of the weights
    estimator = method.estimator(eps)
    n = estimator.probes
    kappa = (size - 1 + n) / n if direction == "rademacher" else (size + 1 + n) / n
    mu = rule.momentum if isinstance(rule, Momentum) else 0.0
    if estimator.normalize == "none" and isinstance(rule, (SGD, Momentum)):
        # 1 / kappa is the best rate for sgd; momentum multiplies a rate by up to 1 / (1 - mu).
        lr = (1 - mu) / kappa / (2 if mu else 1)
        # Markov: one seed in twenty may exceed 20 times the expectation, and this one does not. The weights' own
        # spacing, and the curvature that one side sees, eps / 2 * |z|^2, keep the error above a floor.
        bound = 20 * expected_loss(steps, lr, mu, kappa) + (0.05 if half else 1e-4)
    else:
        # Steps of a fixed length at an angle to the gradient: its cosine is about 1 / sqrt(kappa). They must reach
        # three times as far as the target, and come to rest at a distance of length / (2 cosine).
        length = 3 * math.sqrt(size) * math.sqrt(kappa) / steps
        unit = {"none": 1.0, "sigma": math.sqrt(kappa), "rank": 0.3 * math.sqrt(kappa), "spread": math.sqrt(kappa)}
        unit = unit[estimator.normalize]
        if isinstance(rule, Sign):
            unit = math.sqrt(size)
        if isinstance(rule, Adam):
            unit = math.sqrt(size) / 2
        lr = length / unit * (1 - mu)
        # The rest is 1.5 kappa / steps of the way, 8% at most; thrice that allows for the units being approximate.
        bound = (3 * 1.5 * kappa / steps) ** 2 + (0.05 if half else 0)
    model = Quadratic(dtype)
    optimizer = MeZO(model, lr=lr, direction=direction, perturbation="copy", estimator=estimator, rule=rule, seed=1)
    start = model().item()
    for _ in range(steps):
        optimizer.step(model)
    assert model().item() < bound * start
    assert bound < 0.2


# --- estimators ------------------------------------------------------------------------------------------------------


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


# --- rules -----------------------------------------------------------------------------------------------------------


def long_enough(dtype: torch.dtype) -> nn.Module:
    """More than a tile and a block, and not a multiple of them; the second tensor not contiguous."""
    values = torch.linspace(-2, 2, 3 * 401).pow(3).view(401, 3).to(dtype)
    model = nn.Module()
    model.a, model.b = Point(values.clone()), Point(values.t())
    return model


LOSSES = (1.0, 0.25, -0.5, 2.0, 0.75)


def scripted_run(model: nn.Module, rule: Rule | str, steps: int = 6, **settings: Any) -> MeZO:
    """Steps on losses that are given, so that two runs can differ in nothing but what is compared."""
    settings = {"probes": 2, "weight_decay": 0.25, "lr": 1e-2, **settings}
    optimizer = trusted(MeZO(model, eps=0.25, perturbation="copy", rule=rule, seed=3, **settings))
    train(optimizer, *[scripted(*LOSSES)] * steps)
    return optimizer


@every_dtype
@every_direction
@every_rule
def test_plain_torch_gives_the_same_bits_as_the_kernels(rule, direction, dtype, monkeypatch):
    fast, slow = long_enough(dtype), long_enough(dtype)
    first = scripted_run(fast, rule, direction=direction)
    with monkeypatch.context() as patch:
        patch.setattr(noise.backends, "fast", lambda device, dtype: "not here")
        patch.setattr(noise.backends, "_told", True)
        second = scripted_run(slow, rule, direction=direction)
    assert_same_bits(slow, snapshot(fast))
    assert first.last.unchanged == second.last.unchanged


@pytest.mark.parametrize(("sizes", "elsewhere"), [({"cpu": 512}, 1), ({}, 500)], ids=["on-cpu", "elsewhere"])
@every_rule
def test_pieces_of_a_tensor_add_up_to_the_whole(rule, sizes, elsewhere, monkeypatch):
    whole, parts = long_enough(torch.bfloat16), long_enough(torch.bfloat16)
    one = scripted_run(whole, rule)
    monkeypatch.setattr("forwardtune.method.moments._PIECE", sizes)
    monkeypatch.setattr("forwardtune.method.moments._PIECE_ELSEWHERE", elsewhere)
    many = scripted_run(parts, rule)
    assert_same_bits(parts, snapshot(whole))
    assert one.last.unchanged == many.last.unchanged


@every_dtype
@pytest.mark.parametrize("kind", [Momentum, Adam])
def test_a_window_over_the_whole_history_is_exact(kind, dtype):
    exact, window = long_enough(dtype), long_enough(dtype)
    scripted_run(exact, kind(state="exact"), steps=12)
    scripted_run(window, kind(window=12), steps=12)
    assert_same_bits(window, snapshot(exact))


def test_what_a_window_of_momentum_cuts_off_is_below_one_percent():
    """Of the largest m: the cut-off part is ``sum_{j >= W} mu^j g``, and ``mu^W`` is below 1%."""
    mu, steps, lr = 0.5, 30, 1e-2
    exact, window = long_enough(torch.float64), long_enough(torch.float64)
    scripted_run(exact, Momentum(mu, state="exact"), steps, weight_decay=0.0, lr=lr)
    optimizer = scripted_run(window, Momentum(mu, state="window"), steps, weight_decay=0.0, lr=lr)
    assert optimizer.rule.window == 7
    largest = 3.67 * 2.5 / (2 * 0.25) / (1 - mu)  # |z| times the largest difference of losses over 2 eps
    for a, b in zip(exact.parameters(), window.parameters(), strict=True):
        difference = (a - b).abs().max().item()
        assert 0 < difference <= steps * lr * 0.01 * largest


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (Momentum(0.9, state="exact"), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (Momentum(0.9, window=50), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (Adam(0.9, 0.99, state="exact"), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.25)),
        (Adam(0.9, 0.99, window=50), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.25)),
    ],
    ids=["momentum-exact", "momentum-window", "adam-exact", "adam-window"],
)
def test_moments_are_those_of_torch_optim(rule, reference):
    """Fed with the same estimate, in float64 (torch's SGD couples weight decay to the gradient: without it there)."""
    steps = 20
    ours, theirs = long_enough(torch.float64), long_enough(torch.float64)
    optimizer = scripted_run(ours, rule, 0, weight_decay=0.25 if isinstance(rule, Adam) else 0.0)
    other = reference(theirs.parameters())
    closure = scripted(*LOSSES)
    for step in range(steps):
        optimizer.step(closure)
        for tensor, parameter in zip(optimizer.tuned, (theirs.a.value, theirs.b.value), strict=True):
            zs = [optimizer.noise.z(parameter, tensor=tensor.id, step=step, probe=k) for k in range(2)]
            parameter.grad = sum(c * z.double() for c, z in zip(optimizer.last.coefficients, zs, strict=True)) / 2
        other.step()
    # Coefficients, factors and rates are rounded to float32, 2^-24 each: a handful of such errors in moves that add up
    # to less than 20 steps * lr * |m| <= 20 * 0.01 * 100.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=8 * 2.0**-24 * 20)
    assert (ours.a.value - long_enough(torch.float64).a.value).abs().mean() > 0.1


def test_sign_moves_every_weight_by_the_learning_rate():
    model = long_enough(torch.float64)
    before = snapshot(model)
    optimizer = scripted_run(model, Sign(), 1, weight_decay=0.0, lr=2.0**-7, probes=1)
    for tensor in optimizer.tuned:
        z = optimizer.noise.z(tensor.parameter, tensor=tensor.id, step=0, probe=0)
        moved = tensor.parameter.detach() - before[tensor.name]
        # theta is below 8 and float64: the difference is exact to 2^-49.
        torch.testing.assert_close(moved, -(2.0**-7) * z.sign().double(), rtol=0, atol=2.0**-49)


def test_weight_decay_is_decoupled_in_every_rule():
    """Without slope, and before there are moments, it is all that moves the weights; and only where it is asked for."""
    for rule, decay in itertools.product(RULES.values(), (0.25, 0.0)):
        model = long_enough(torch.float32)
        before = snapshot(model)
        optimizer = MeZO(model, lr=0.5, weight_decay=decay, perturbation="copy", rule=rule)
        optimizer.step(lambda: 1.0)
        assert optimizer.last.flat
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name] * (1 - decay / 2))
    assert (sgd(0, [1.0], 0.1).decay, sgd(0, [1.0], 0.5, 0.5).decay) == (1.0, 0.75)


@every_rule
def test_a_flat_step_is_taken_and_a_skipped_one_is_not(rule):
    model = long_enough(torch.float32)
    optimizer = scripted_run(model, rule, 2, weight_decay=0.0)
    before = snapshot(model)
    optimizer.step(lambda: math.inf)
    assert_same_bits(model, before)
    assert optimizer.history.taken == (2 if rule.remembers else 0)
    optimizer.step(lambda: 1.0)
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert moved == rule.remembers  # momentum carries on
    assert optimizer.history.taken == (3 if rule.remembers else 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("start", [0, 512, 2**35 - 2**13])
@pytest.mark.parametrize("size", [0, 1, 7, 511, 1300])
def test_storing_rounds_as_the_definition_does(size, start, dtype, monkeypatch):
    """By all kernels that are here, Triton's in its interpreter."""
    where = {"seed": 2**63 + 9, "tensor": 5, "step": 7, "start": start}
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, generator=draw) ** 9).to(dtype)
    x = weight.float() * (1 + torch.randn(size, generator=draw) / 256)
    x[::5] = weight[::5].float()
    stored = weight.clone()
    count = definition.store(stored, x, **where)
    random = half_words(where["seed"], 5, 7, ROUNDING_PROBE, start, size)
    assert same_bits(stored, definition.round_stochastically(x, random, dtype).to(dtype))
    assert count == int((stored == weight).sum()) >= size // 5
    kernels = [pytest.importorskip("forwardtune.noise.cpu")]
    try:
        from test_noise_gpu import load_interpreted
    except pytest.skip.Exception:
        pass
    else:
        kernels.append(load_interpreted())
    for kernel in kernels:
        here = weight.clone()
        assert int(kernel.store(here, x, **where)) == count
        assert same_bits(here, stored)


def test_the_update_and_the_store_round_alike():
    """sgd as one fused sweep, and spelled out: the same rounding bits."""
    fused, spelled = (torch.linspace(-3, 3, 1300).to(torch.bfloat16) for _ in range(2))
    source = Noise(4)
    update = noise.Update(3, (1e-3, -2e-3), 0.75)
    source.update(fused, [update], tensor=2)
    x = spelled.float()
    source.update(x, [update], tensor=2)
    source.store(spelled, x, tensor=2, step=3)
    assert same_bits(fused, spelled)


# --- what a rule keeps, and where ------------------------------------------------------------------------------------


def test_the_form_of_the_memory_follows_the_share_that_is_tuned():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 2, bias=False))
    whole = MeZO(model, rule="adam").rule
    assert (whole.state, whole.window) == ("window", 90)
    model[0].requires_grad_(False)  # 128 of 4,224 weights are left: 1 KiB of moments beside 16.5 KiB
    adapter = MeZO(model, rule="adam").rule
    assert (adapter.state, adapter.window) == ("exact", None)
    assert MeZO(list(model[1].parameters()), rule="adam").rule.state == "window"  # the model is not known
    assert MeZO(model, rule=Adam(window=5)).rule.settings()["window"] == 5
    assert MeZO(model, rule="momentum").rule.state == "exact"


@pytest.mark.parametrize(("mu", "window"), [(0.0, 1), (0.01, 2), (0.9, 44), (0.99, 459)])
def test_a_window_holds_99_percent(mu, window):
    model = Quadratic()
    rule = Momentum(mu, state="window").resolved(
        TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    )
    assert rule.window == window
    assert mu**window < 0.01
    assert window == 1 or mu ** (window - 1) >= 0.01


@pytest.mark.parametrize(("rule", "weights"), [("momentum", 1000), ("adam", 2000)])
@pytest.mark.parametrize(("count", "state"), [(100, "exact"), (101, "window")])
def test_moments_are_exact_up_to_a_tenth_of_the_models_memory(rule, weights, count, state):
    model = nn.ParameterList([torch.zeros(count), torch.zeros(weights - count)])
    model[1].requires_grad_(False)
    assert MeZO(model, rule=rule).rule.state == state
    model[1].data = model[1].data.double()  # memory counts, not the number of weights
    assert MeZO(model, rule=rule).rule.state == "exact"


@every_rule_with_moments
def test_moments_are_kept_where_they_are_wanted(rule):
    model = long_enough(torch.float32)
    tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    for keep in (False, True):
        history = History()
        move_all(rule, Noise(0), tuned, [[rule.plan(0, [1.0], 1e-2, 0.0)]], history, keep=keep)
        assert bool(history.moments) == (keep and rule.state == "exact")


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_did_not_change_is_counted_over_all_steps(rule, dtype):
    """Skipped ones too, in which nothing changes."""
    model, one_by_one, counts = long_enough(dtype), long_enough(dtype), []
    rule = rule.resolved(TunedParameters.from_groups([{"params": list(model.parameters())}], model))
    updates = [Update(0, ()), rule.plan(1, [2.0], 1e-4, 0.0), Update(2, ()), rule.plan(3, [1.0], 1e-4, 0.25)]
    tuned = TunedParameters.from_groups([{"params": list(one_by_one.parameters())}], one_by_one)
    history = History()
    for update in updates:
        before = snapshot(one_by_one)
        counted = move_all(rule, Noise(0), tuned, [[update]], history)
        same = sum(int((tensor == before[name]).sum()) for name, tensor in one_by_one.state_dict().items())
        assert counted == same
        counts.append(counted)
    assert counts[0] == counts[2] == tuned.numel
    assert 0 < counts[1] < tuned.numel or dtype == torch.float64
    tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    assert move_all(rule, Noise(0), tuned, [updates], History()) == sum(counts)
    assert_same_bits(model, snapshot(one_by_one))


def test_the_root_of_adam_is_rounded_to_nearest():
    """torch's own is a last place off for some numbers on a CPU, and so differs from a GPU's."""
    v = torch.arange(0x3F800000, 0x40800000, 61, dtype=torch.int32).view(torch.float32)
    v = torch.cat([v, v * 1e-14, torch.tensor([0.0, 1e-45, 3e38, math.inf])])
    expected = torch.from_numpy(np.sqrt(v.numpy()))
    assert torch.equal(nearest_root(v), expected)
    m, step = torch.ones_like(v), Adam().plan(0, [1.0], 0.5, 0.0)
    direction = Adam(beta1=0.5, beta2=0.75).direction([m, v], step, 1)  # sqrt(1 - b2) is 1/2, exactly
    assert torch.equal(direction, m / (expected * 2.0 + float32(1e-8)))


def test_a_step_of_adam_must_fit_its_float32_moments():
    """``(4 sum |sizes|)^2`` is at most the largest float32, 2^128."""
    assert Adam().plan(0, [0.99 * 2.0**62], 1e-6, 0.0)
    assert Adam().plan(0, [0.99 * 2.0**62, -0.99 * 2.0**62], 1e-6, 0.0)
    for coefficients in ([1.01 * 2.0**62], [1.01 * 2.0**62, -1.01 * 2.0**62]):
        with pytest.raises(OverflowError):
            Adam().plan(0, coefficients, 1e-6, 0.0)
    assert Momentum().plan(0, [1.01 * 2.0**62], 1e-6, 0.0)


@every_rule
def test_the_memory_is_what_it_is_said_to_be(rule):
    model = long_enough(torch.bfloat16)
    optimizer = scripted_run(model, rule)
    moments = [moment for kept in optimizer.history.moments.values() for moment in kept]
    rule = optimizer.rule
    kept = rule.averages if rule.remembers and rule.state == "exact" else 0
    assert sum(moment.numel() for moment in moments) == kept * optimizer.tuned.numel
    assert {moment.dtype for moment in moments} <= {torch.float32}
    assert len(optimizer.history.recent) == (rule.window or 0 if rule.remembers else 0)
    assert not optimizer.state


@pytest.mark.usefixtures("random_state_untouched")
def test_steps_may_be_taken_in_inference_mode_and_out_of_it():
    plain, mixed = long_enough(torch.float32), long_enough(torch.float32)
    rule = Adam(state="exact")
    scripted_run(plain, rule, 4)
    optimizer = scripted_run(mixed, rule, 0)
    closure = scripted(*LOSSES)
    for step in range(4):
        with torch.inference_mode(step % 2 == 0):
            optimizer.step(closure)
    assert_same_bits(mixed, snapshot(plain))


# --- what must be refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeZO(Quadratic(), rule="adma"), "unknown rule 'adma'; did you mean adam"),
        (lambda: MeZO(Quadratic(), estimator="two_sided"), "unknown estimator 'two_sided'.*spsa, one_sided"),
        (lambda: MeZO(Quadratic(), normalize="sigmas"), "unknown normalize.*did you mean sigma"),
        (lambda: MeZO(Quadratic(), normalize="sigma", probes=1), "set probes to 2 or more"),
        (lambda: MeZO(Quadratic(), normalize="rank", estimator="one_sided"), "set probes to 2 or more"),
        *((lambda mu=mu: Momentum(mu), "momentum must be a number from 0 up to 1") for mu in (1.0, -0.1, "0.5")),
        (lambda: Adam(0.9, math.nan), "beta2 must be"),
        *((lambda e=e: Adam(epsilon=e), "epsilon must be a positive") for e in (0.0, 1e-37, math.inf, "1e-8")),
        (lambda: Adam(state="exactly"), "unknown state.*did you mean exact"),
        (lambda: Adam(window=0), "window must be an integer"),
        (lambda: Adam(window=2.5), "window must be an integer"),
        (lambda: Adam(window=5, state="exact"), "leave window out"),
        (lambda: get_rule("momentum", beta=0.5), "no setting 'beta'.*momentum"),
        (lambda: get_rule("sgd", momentum=0.5), "'sgd' has no setting 'momentum'.*decay_towards"),
        *(
            (lambda normalize=normalize: SPSA(1e-3, 2, normalize).coefficients([1.0, 2.0, 3.0]), "zip")  # lacks a side
            for normalize in ("none", "sigma", "rank")
        ),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_at_the_border_are_taken():
    assert Adam(0.0, 0.0, epsilon=2e-37, window=1).window == 1
    assert [cls(1e-3, 2, normalize).probes for cls in (SPSA, OneSided) for normalize in ("sigma", "rank")] == [2] * 4


WITH_MOMENTUM = {"rule": Momentum(0.5, window=3), "normalize": "sigma"}


@pytest.mark.parametrize(
    ("logged", "ours", "words"),
    [
        (WITH_MOMENTUM, {"rule": Adam(0.5, window=3)}, "rule is 'momentum' in the log, 'adam' here"),
        (WITH_MOMENTUM, {"rule": "sgd"}, "rule is 'momentum' in the log, 'sgd' here"),
        (WITH_MOMENTUM, {"rule": Momentum(0.6, window=3)}, "rule_settings is .*0.5.* in the log, .*0.6.* here"),
        (WITH_MOMENTUM, {"rule": Momentum(0.5, window=4)}, "rule_settings is"),
        (WITH_MOMENTUM, {"rule": Momentum(0.5, state="exact")}, "rule_settings is"),
        (WITH_MOMENTUM, {"normalize": "none"}, "normalize is 'sigma' in the log, 'none' here"),
        (WITH_MOMENTUM, {"normalize": "rank"}, "normalize is 'sigma' in the log, 'rank' here"),
        (WITH_MOMENTUM, {"estimator": "one_sided"}, "estimator is 'spsa' in the log, 'one_sided' here"),
        ({}, {"normalize": "rank"}, "normalize is 'none' in the log, 'rank' here"),
    ],
    ids=str,
)
def test_a_log_is_resumed_by_its_own_method_alone(logged, ours, words, tmp_path):
    settings = {"lr": 0.1, "probes": 2, "perturbation": "copy", **logged}
    path, model = tmp_path / "steps.jsonl", Quadratic()
    with StepLog(path, optimizer := MeZO(model, **settings)):
        take_steps(model, optimizer, 2)
    with pytest.raises(LogError, match=f"belongs to another run: {words}"):
        StepLog.resume(path, MeZO(Quadratic(), **{**settings, **ours}))


@pytest.mark.parametrize(
    ("first", "second"),
    [("sgd", Adam(window=3)), (Adam(window=3), "sgd"), (Adam(window=3), Adam(window=4)), ("momentum", "adam")],
    ids=str,
)
def test_a_state_of_another_rule_is_refused(first, second):
    saved = scripted_run(Quadratic(), first).state_dict()
    with pytest.raises(ValueError, match=r"the state was saved with .*: use the same rule"):
        scripted_run(Quadratic(), second, 0).load_state_dict(saved)


def test_bookkeeping_alone_does_not_bring_moments_back(tmp_path):
    path, model = tmp_path / "steps.jsonl", Quadratic()
    with StepLog(path, optimizer := MeZO(model, rule="momentum", perturbation="copy")):
        optimizer.step(model)
    with pytest.raises(ValueError, match="remembers earlier steps"):
        MeZO(model, rule="momentum", perturbation="copy").fast_forward(read_log(path).records)


def test_the_header_names_the_method(tmp_path):
    path, model = tmp_path / "steps.jsonl", Quadratic()
    StepLog(path, MeZO(model, rule="adam", estimator="one_sided", probes=3, normalize="sigma")).close()
    header = read_log(path).header
    keys = ["direction", "estimator", "eps", "probes", "normalize", "rule", "rule_settings", "groups"]
    assert [key for key in header if key in keys] == keys
    assert [header[key] for key in keys[1:6]] == ["one_sided", 1e-3, 3, "sigma", "adam"]
    assert header["rule_settings"] == {
        "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "root": "nearest", "state": "window", "window": 90,
    }  # fmt: skip


LEARNS, SKIPS = (1.0, 0.5, 2.0, 0.5, 0.25, 1.0), (math.nan,) * 6
EXPORTED = {  # rule, groups, weight decay, learning rates, losses, shapes of what is kept beside the sizes
    "sgd": ("sgd", 1, 0.0, [0.5] * 3, LEARNS, {}),
    "sgd, decayed": ("sgd", 2, 0.5, [0.5] * 3, LEARNS, {"decay": (2, 1)}),
    "sgd, nothing taken": ("sgd", 2, 0.5, [0.5] * 3, SKIPS, {}),
    "sign": ("sign", 1, 0.0, [0.5] * 3, LEARNS, {"lr": (1, 1)}),
    "sign, decayed": ("sign", 2, 0.5, [0.5] * 3, LEARNS, {"decay": (2, 1), "lr": (2, 1)}),
    "sign, nothing taken": ("sign", 2, 0.5, [0.5] * 3, SKIPS, {"lr": (2, 1)}),
    "sign, halved": ("sign", 1, 0.0, [0.1, 0.1, 0.05], LEARNS, {"lr": (1, 3)}),
    "sign, changing": ("sign", 1, 0.0, [0.1, 0.05, 0.03], LEARNS, {"lr": (1, 3)}),
}


@pytest.mark.parametrize(("rule", "groups", "decay", "rates", "losses", "shapes"), EXPORTED.values(), ids=EXPORTED)
def test_an_export_holds_once_what_is_the_same_throughout(rule, groups, decay, rates, losses, shapes, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, closure = Quadratic(), scripted(*losses)
    params = [{"params": list(part.parameters())} for part in (model.flat, model.turned)]
    params = params if groups == 2 else list(model.parameters())
    optimizer = trusted(MeZO(params, 0.5, module=model, rule=rule, perturbation="copy", weight_decay=decay))
    path, exported = tmp_path / "steps.jsonl", tmp_path / "deep" / "run.safetensors"
    with StepLog(path, optimizer):
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step(closure)
    export_trajectory(read_log(path), exported)
    again = Quadratic()
    replay(read_trajectory(exported), again)
    replay(read_log(path), Quadratic())
    assert_same_bits(again, snapshot(model))
    with safe_open(exported, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["forwardtune"] == "trajectory"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {"sizes": (1, 3, 1), **shapes}
    if "lr" in shapes:
        assert tensors.pop("lr").dtype == torch.float32
        del metadata["check"]
        save_file(tensors, exported, metadata=metadata)
        with pytest.raises(LogError, match="lacks the learning rates"):
            read_trajectory(exported)


# --- in Trainer ------------------------------------------------------------------------------------------------------


TRAINED: dict[str, dict[str, Any]] = {
    "momentum": {"rule": "momentum", "momentum": 0.5, "rule_state": "exact", "estimator": "one_sided"},
    "adam": {"rule": "adam", "adam_beta1": 0.5, "rule_window": 3, "probes": 2, "normalize": "sigma"},
    "sign": {"rule": "sign", "estimator": "one_sided", "probes": 2, "normalize": "rank"},
}


@pytest.mark.parametrize(
    ("settings", "saving"),
    [(TRAINED["momentum"], False), (TRAINED["momentum"], True), (TRAINED["adam"], False), (TRAINED["sign"], True)],
    ids=["momentum-log-alone", "momentum-checkpoints", "adam-log-alone", "sign-checkpoints"],
)
def test_trainer_resumes_a_rule_with_the_same_bits(settings, saving, tmp_path: Path):
    import test_trainer

    if saving:
        settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    whole = test_trainer.trained(tmp_path / "whole", **settings)
    assert whole.mezo.rule.name == settings["rule"]
    test_trainer.killed(tmp_path / "killed", 4, **settings)
    resumed = test_trainer.resumed(tmp_path / "killed", **settings)
    assert_same_bits(resumed.model, snapshot(whole.model))
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "sgd", "rule_state": "exact"}, "'sgd' remembers nothing: leave rule_state"),
        ({"normalize": "sigma"}, "set probes to 2"),
    ],
    ids=str,
)
def test_trainer_refuses_what_the_optimizer_refuses(settings, words, tmp_path: Path):
    """When the settings are made: nothing was loaded yet."""
    import test_trainer

    with pytest.raises(ValueError, match=words):
        test_trainer.MeZOConfig(str(tmp_path), use_cpu=True, **settings)
