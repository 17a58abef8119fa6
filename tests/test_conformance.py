"""One suite for every way to combine a direction, a perturbation, an estimator and a rule.

A new member of an axis is one line in a table of ``support/methods.py``, and must pass all of it.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO, StepLog, replay
from forwardtune.method.estimators import SPSA
from forwardtune.method.rules import SGD, Adam, Momentum, Muon, Sign
from forwardtune.trajectory import export_trajectory, read_log
from forwardtune.trajectory.log import cut_log
from support import DTYPES, assert_same_bits, same_bits, snapshot
from support.methods import (
    DIRECTIONS,
    FLAT,
    METHODS,
    PERTURBATIONS,
    RULES,
    SKIPPED,
    STEPS,
    Point,
    Quadratic,
    eventful,
    every_direction,
    every_method,
    every_perturbation,
    every_rule,
    take_steps,
)

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
