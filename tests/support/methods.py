"""The members of every axis of the method, in tables, and small models whose steps can be told in advance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO
from forwardtune.method.estimators import SPSA, Estimator, OneSided
from forwardtune.method.rule import Rule
from forwardtune.method.rules import SGD, Adam, Momentum, Sign
from support import DTYPES, scripted, train, trusted

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


# --- steps on losses that are given ----------------------------------------------------------------------------------


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
