"""Weights of consecutive modules that are perturbed together give what weights that are perturbed one by one give.

Where nothing is gained by it, on a CPU, it is not done: here the CPU's sweeps say that they can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.noise import cpu
from forwardtune.points import Scratch, windows
from support.launches import Launches, sharing


def outcome(make: Callable[[], Any], loss: Callable[[Any, int], Tensor], steps: int = 3, **settings: Any) -> Any:
    model = make()
    optimizer = MeZO(model, **{"lr": 1e-2, "eps": 1e-2, "seed": 5, "perturbation": "scratch", **settings})
    losses = [optimizer.step(lambda step=step: loss(model, step)) for step in range(steps)]
    return losses, optimizer.tuned.digest(), optimizer


def assert_alike(make: Callable[[], Any], loss: Callable[[Any, int], Tensor], **settings: Any) -> tuple[Launches, MeZO]:
    losses, digest, _ = outcome(make, loss, **settings)
    with sharing() as launches:
        found, other, optimizer = outcome(make, loss, **settings)
    assert found == losses
    assert other == digest
    return launches, optimizer


def of_tokens(model: Any, step: int) -> Tensor:
    tokens = support.token_batch(seed=step)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **extra).logits.float().pow(2).mean()


@pytest.mark.parametrize(
    "family", ["llama", "llama_untied", "opt", "gpt2", "gemma3", "qwen3_moe", "t5", "bert", "mamba"]
)
def test_every_family_has_the_bits_of_single_sweeps(family: str) -> None:
    launches, optimizer = assert_alike(lambda: support.tiny_model(family, torch.bfloat16), of_tokens)
    assert isinstance(optimizer.perturbation, Scratch)
    assert len(launches) >= 4
    assert max(launches) >= 8


@pytest.mark.parametrize(
    "settings",
    [
        {"probes": 2, "estimator": "one_sided"},
        {"rank": 2, "refresh": 2},
        {"active_layers": 1},
        {"rule": "adam"},
        {"eps": 0.3},
    ],
    ids=str,
)
def test_so_does_every_method(settings: dict[str, Any]) -> None:
    assert_alike(lambda: support.tiny_model("llama"), of_tokens, **settings)


class Odd(nn.Module):
    """Modules that are shared, skipped, called in another order, and called inside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.parts[4].weight = self.parts[1].weight
        self.outer = Outer()
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 6)

    def forward(self, x: Tensor, step: int) -> Tensor:
        order = [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [0, 0, 5, 0, 5, 0]][step % 3]
        for i in order:
            x = torch.tanh(self.parts[i](x))
        return self.outer(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(32)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) * self.scale


def of_odd(model: Odd, step: int) -> Tensor:
    return model(torch.linspace(-1, 1, 32).repeat(4, 1), step).pow(2).mean()


@pytest.mark.parametrize("beside", [0, 5000, 2**20])
def test_no_order_of_calls_changes_a_bit(beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one module, of two, and one of all."""
    monkeypatch.setattr(windows, "_VECTORS", beside)
    assert_alike(Odd, of_odd, steps=30)


def test_weights_may_move_between_steps() -> None:
    def outcome() -> str:
        model = Odd()
        optimizer = MeZO(model, lr=1e-2, eps=1e-2, perturbation="scratch")
        for step in range(6):
            optimizer.step(lambda: of_odd(model, 0))
            if step % 2:
                old = [p.data for p in model.parameters()]
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
                for values in old:
                    values.fill_(torch.nan)
        return optimizer.tuned.digest()

    expected = outcome()
    with sharing():
        assert outcome() == expected


def test_windows_whose_modules_do_not_follow_each_other_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perturbing all of a window for one module, again and again, would cost more than it saves."""
    monkeypatch.setattr(windows, "_VECTORS", 5000)  # two neighbours in each

    def jumping(model: Odd, step: int) -> Tensor:
        return of_odd(model, 2 if step else 0)

    with sharing() as launches:
        model = Odd()
        optimizer = support.trusted(MeZO(model, lr=1e-3, perturbation="scratch"))
        for step in range(40):
            before = len(launches)
            optimizer.step(lambda step=step: jumping(model, step))
            if step == 1:
                assert len(launches) - before >= 10
    assert len(launches) - before <= 2


def test_a_window_takes_no_more_memory_than_the_largest_module_and_a_mebibyte() -> None:
    class Deep(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Linear(512, 512) for _ in range(8)), nn.Linear(512, 2048), nn.Linear(2048, 512))

    model = Deep()
    optimizer = MeZO(model, lr=1e-3, perturbation="scratch")
    with sharing() as launches:
        for _ in range(2):
            optimizer.step(lambda: model(torch.ones(2, 512)).pow(2).mean())
    assert isinstance(optimizer.perturbation, Scratch)
    assert max(launches) > 2
    largest = max(sum(p.nbytes for p in module.parameters()) for module in model)
    assert optimizer.perturbation.nbytes <= largest + 2**20 + 2**16


def test_a_loss_that_fails_half_way_leaves_nothing_behind() -> None:
    model = support.tiny_model("llama")
    before = support.snapshot(model)
    optimizer = support.trusted(MeZO(model, lr=1e-3, perturbation="scratch"))
    fails = False

    def hook(*_: Any) -> None:
        if fails:
            raise KeyError("half-way")

    model.model.layers[1].mlp.register_forward_pre_hook(hook)
    with sharing(), torch.no_grad():
        with optimizer.perturbation as perturbation:  # type: ignore[union-attr]
            perturbation.shift(0, Query(0, 1e-2))
            first = float(of_tokens(model, 0))
            for fails in (True, False):
                perturbation.shift(0, Query(0, 1e-2))
                if fails:
                    with pytest.raises(KeyError):
                        of_tokens(model, 0)
                else:
                    assert float(of_tokens(model, 0)) == first
        support.assert_same_bits(model, before)


class Gated(nn.Module):
    """Weights of two dtypes in one module, inside of a module with a weight of its own."""

    def __init__(self, kinds: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.layers = nn.ModuleList(Gate(kinds) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.scale.to(x.dtype)


class Gate(nn.Module):
    def __init__(self, kinds: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.matrix = nn.Parameter((torch.eye(16) + 0.1).to(kinds[0]))
        self.gate = nn.Parameter(torch.linspace(0.5, 1, 16).to(kinds[1]))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.matrix.dtype) @ self.matrix) * self.gate.to(self.matrix.dtype)


def of_gated(model: Gated, step: int) -> Tensor:
    return model(torch.linspace(-1, 1, 16).repeat(3, 1)).float().pow(2).mean()


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_kernel_sweeps_over_one_dtype(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    launches, _ = assert_alike(lambda: Gated(kinds), of_gated)
    assert launches == []


def test_modules_inside_of_one_that_owns_a_weight_share_launches() -> None:
    launches, _ = assert_alike(lambda: Gated((torch.float32, torch.float32)), of_gated)
    assert set(launches) == {12}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: setattr(model.layers[2].matrix, "data", model.layers[2].matrix.data.t().clone().t()),
        lambda model: [p.requires_grad_(False) for p in model.layers[1].parameters()],
    ],
    ids=["double", "bfloat16", "strides", "frozen"],
)
def test_weights_may_change_their_kind_between_steps(change: Callable[[Any], Any]) -> None:
    def outcome() -> Any:
        model = Gated((torch.float32, torch.float32))
        optimizer = MeZO(model, lr=1e-2, eps=1e-2, perturbation="scratch")
        losses = []
        for step in range(6):
            losses.append(optimizer.step(lambda: of_gated(model, 0)))
            if step == 2:
                change(model)
        return losses

    expected = outcome()
    with sharing():
        assert outcome() == expected


def test_a_launch_that_fails_leaves_no_values_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(fails: bool) -> Any:
        model = Gated((torch.float32, torch.float32))
        optimizer = support.trusted(MeZO(model, lr=1e-2, eps=1e-2, perturbation="scratch"))
        losses = [optimizer.step(lambda: of_gated(model, 0))]
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "perturb", lambda *_: [][0])
                with pytest.raises(IndexError):
                    optimizer.step(lambda: of_gated(model, 0))
        return [*losses, *(optimizer.step(lambda: of_gated(model, 0)) for _ in range(3))]

    with sharing():
        assert outcome(True) == outcome(False)


def test_an_evaluation_that_stopped_half_way_is_not_the_last_word() -> None:
    model = Gated((torch.float32, torch.float32))
    optimizer = support.trusted(MeZO(model, lr=1e-2, eps=1e-2, perturbation="scratch"))
    hook = model.layers[2].register_forward_pre_hook(lambda *_: [][0])
    with sharing() as launches:
        with pytest.raises(IndexError):
            optimizer.step(lambda: of_gated(model, 0))
        hook.remove()
        for _ in range(2):
            launches.clear()
            optimizer.step(lambda: of_gated(model, 0))
    assert launches == [12, 12]
