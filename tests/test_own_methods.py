"""Directions and rules of a user's own: registered, their runs are logged and replayed; otherwise no log is begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from forwardtune import MeZO, StepLog, replay
from forwardtune.method.rule import Rule
from forwardtune.method.rules import RULES, SGD, Adam, Momentum, get_rule, register_rule
from forwardtune.noise import DIRECTIONS, GAUSSIAN, RADEMACHER, Direction, Noise, Update, definition, register_direction
from forwardtune.noise.philox import half_words
from forwardtune.trajectory import LogError, export_trajectory, read_log
from support import DTYPES, assert_same_bits, same_bits, snapshot

THREE = Direction("three", 2, torch.tensor([-(2.0**0.5), 0.0, 0.0, 2.0**0.5]))


@dataclass(frozen=True)
class Damped(Momentum):
    """A rule with moments and a setting more."""

    name: ClassVar[str] = "damped"
    share: float = 1.0

    def direction(self, averages: Any, step: Any, count: int) -> torch.Tensor:
        return super().direction(averages, step, count).mul_(self.share)


class Halved(SGD):
    """A plain class with an argument."""

    name = "halved"

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def settings(self) -> dict[str, Any]:
        return {"share": self.share}

    def plan(self, step: int, coefficients: Any, lr: float, weight_decay: float) -> Update:
        return super().plan(step, coefficients, lr * self.share, weight_decay)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is unknown to the next one."""
    before = dict(DIRECTIONS), dict(RULES)
    yield
    for registry, kept in zip((DIRECTIONS, RULES), before, strict=True):
        registry.clear()
        registry.update(kept)


def net(dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(40, 40, dtype=dtype)
    torch.nn.init.constant_(layer.weight, 0.5)
    torch.nn.init.constant_(layer.bias, -0.25)
    return layer


def trained(path: Path, model: nn.Module, steps: int = 4, **settings: Any) -> MeZO:
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, perturbation="copy", **settings)
    with StepLog(path, optimizer):
        for _ in range(steps):
            optimizer.step(lambda: model(torch.ones(40, dtype=model.weight.dtype)).float().pow(2).mean())
    return optimizer


# --- registered ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"direction": THREE}, {"rule": Halved(0.25)}, {"rule": Damped(0.5, share=0.5, state="exact")}, {"direction": THREE, "rule": Damped()}],
    ids=["direction", "plain-rule", "rule-with-moments", "both"],
)  # fmt: skip
def test_a_run_is_logged_exported_resumed_and_replayed(settings, dtype, tmp_path):
    register_direction(THREE)
    register_rule(Halved)
    register_rule(Damped)
    path, model = tmp_path / "steps.jsonl", net(dtype)
    trained(path, model, **settings)
    weights = snapshot(model)
    assert not same_bits(model.weight, net(dtype).weight)
    export_trajectory(read_log(path), tmp_path / "trajectory.safetensors")
    for source in (path, tmp_path / "trajectory.safetensors"):
        base = net(dtype)
        assert replay(source, base) == 4
        assert_same_bits(base, weights)
    base = net(dtype)
    StepLog.resume(path, MeZO(base, lr=1e-2, eps=1e-2, perturbation="copy", **settings)).close()
    assert_same_bits(base, weights)


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_kernels_take_a_table_of_any_size(bits):
    values = torch.randn(2**bits, generator=torch.Generator().manual_seed(0))
    direction, source = Direction("any", bits, values), torch.zeros(1500)
    out, expected = torch.empty(1500), torch.empty(1500)
    Noise(5, direction).perturb(out, source, tensor=1, step=2, probe=3, scale=1.0)
    definition.perturb(expected, source, direction, 5, 1, 2, 3, 1.0)
    assert same_bits(out, expected)
    assert same_bits(out, values[half_words(5, 1, 2, 3, 0, 1500) >> (16 - bits)])


def test_a_registered_method_is_found_by_its_name(tmp_path):
    register_direction(THREE)
    assert register_rule(Halved) is Halved
    model, other = net(), net()
    trained(tmp_path / "a.jsonl", model, direction="three", rule="halved")
    trained(tmp_path / "b.jsonl", other, direction=THREE, rule=Halved())
    assert_same_bits(model, snapshot(other))
    assert get_rule("halved", share=0.1).share == 0.1


def test_the_header_keeps_a_digest_of_a_table_that_is_not_ours(tmp_path):
    register_direction(THREE)
    path, model = tmp_path / "steps.jsonl", net()
    trained(path, model, direction=THREE)
    assert read_log(path).header["direction_table"] == THREE.digest()
    trained(tmp_path / "ours.jsonl", net(), direction=RADEMACHER)
    assert "direction_table" not in read_log(tmp_path / "ours.jsonl").header

    DIRECTIONS["three"] = Direction("three", 2, torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(LogError, match="another table of the direction 'three'"):
        read_log(path)
    del DIRECTIONS["three"]
    with pytest.raises(LogError, match=r"direction 'three'.*import the module that calls register_direction"):
        replay(path, net())


def test_a_log_of_a_rule_that_is_not_imported_names_the_remedy(tmp_path):
    register_rule(Halved)
    trained(tmp_path / "steps.jsonl", net(), rule=Halved())
    del RULES["halved"]
    with pytest.raises(LogError, match=r"rule 'halved'.*import the module that calls register_rule"):
        read_log(tmp_path / "steps.jsonl")


# --- not registered --------------------------------------------------------------------------------------------------


class Nameless(SGD):
    """Would be logged, and replayed, as sgd."""


class Forgetful(SGD):
    """Its settings leave out what it was made with."""

    name = "forgetful"

    def __init__(self, share: float = 0.5) -> None:
        self.share = share


class Incomplete(Forgetful):
    """Cannot be made without an argument that its settings leave out."""

    name = "incomplete"

    def __init__(self, share: float) -> None:
        super().__init__(share)


class Pairs(Forgetful):
    """JSON turns its pair into a list."""

    name = "pairs"

    def settings(self) -> dict[str, Any]:
        return {"share": self.share}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": THREE}, "direction 'three' is not registered.*register_direction"),
        ({"direction": Direction("gaussian", 1, RADEMACHER.values)}, "direction 'gaussian' is not registered"),
        ({"rule": Halved()}, "rule 'halved' is not registered.*register_rule"),
        ({"rule": Damped()}, "rule 'damped' is not registered.*register_rule"),
        ({"rule": Nameless()}, "rule 'sgd' is not registered as Nameless.*a name of its own"),
        ({"rule": Forgetful(0.25)}, r"rule 'forgetful' cannot be made again from its settings\(\) {}.*0\.25"),
        ({"rule": Incomplete(0.25)}, "rule 'incomplete' cannot be made again"),
        ({"rule": Pairs((1, 2))}, "rule 'pairs' cannot be made again"),
        ({"rule": Pairs({1})}, "rule 'pairs' cannot be made again.*JSON"),
    ],
    ids=lambda value: value.split("'")[1] if isinstance(value, str) else "",
)
def test_a_log_that_could_not_be_replayed_is_not_begun(settings, message, tmp_path):
    for known in (Forgetful, Incomplete, Pairs):
        register_rule(known)
    path = tmp_path / "runs" / "steps.jsonl"
    optimizer = MeZO(net(), perturbation="copy", **settings)
    with pytest.raises(LogError, match=message):
        StepLog(path, optimizer)
    assert not path.exists()
    assert not optimizer.recorders


@pytest.mark.parametrize("rule", [SGD(), Adam(), Adam(state="exact"), Momentum(window=3), *(name for name in RULES)])
def test_every_rule_of_ours_can_be_made_again(rule, tmp_path):
    trained(tmp_path / "steps.jsonl", net(), rule=rule, steps=1, **({"rank": 1} if rule == "muon" else {}))
    json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])
    assert replay(tmp_path / "steps.jsonl", net()) == 1


# --- what cannot be registered ---------------------------------------------------------------------------------------


def test_a_name_belongs_to_one():
    register_direction(THREE)
    assert register_direction(Direction("three", 2, THREE.values.clone())) is THREE
    with pytest.raises(ValueError, match="another direction 'three'"):
        register_direction(Direction("three", 2, -THREE.values))
    with pytest.raises(ValueError, match="another direction 'gaussian'"):
        register_direction(Direction("gaussian", 1, RADEMACHER.values))
    assert (DIRECTIONS["three"], DIRECTIONS["gaussian"]) == (THREE, GAUSSIAN)
    with pytest.raises(ValueError, match="no name of its own"):
        register_rule(Nameless)
    with pytest.raises(ValueError, match="another rule 'sgd' already, SGD"):
        register_rule(type("Mine", (SGD,), {"name": "sgd"}))
    assert RULES["sgd"] is SGD


def test_a_rule_may_be_defined_again():
    """As a cell of a notebook that is run twice."""

    def define() -> type[Rule]:
        @register_rule
        class Mine(SGD):
            name = "mine"

        return Mine

    define()
    again = define()
    assert RULES["mine"] is again


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        (0, torch.ones(1)), (17, torch.ones(2**17)), (1.0, torch.ones(2)), (2, torch.ones(2)), (1, torch.ones(2, 1)),
        (1, torch.ones(2, dtype=torch.float64)), (1, torch.tensor([1.0, float("nan")])),
    ],
    ids=["no-bit", "17-bits", "float-bits", "short", "matrix", "float64", "nan"],
)  # fmt: skip
def test_a_table_that_bits_cannot_index_is_refused(bits, values):
    """A kernel would read beyond its end."""
    with pytest.raises(ValueError, match="the direction 'odd'"):
        Direction("odd", bits, values)
