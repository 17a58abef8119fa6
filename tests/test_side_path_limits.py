"""What a side path does not have: uses of weights that it does not know are left out and named, models that mix their examples are refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.method.estimators import Query
from forwardtune.points import ReadElsewhereError
from forwardtune.points.owners import examples_at
from support.side_path import COUNT, EPS, LENGTH, by_weights, losses_of, side_path


def test_what_has_no_side_path_is_named_and_stays() -> None:
    model = support.tiny_model("t5")
    before = support.snapshot(model)
    optimizer, _ = side_path(model)
    ids = support.token_batch(COUNT, LENGTH)
    with pytest.warns(UserWarning, match=r"have no side path in this model .*relative_attention_bias"):
        optimizer.step(lambda: losses_of(model, ids))
    optimizer.step(lambda: losses_of(model, ids))
    for name, now in support.snapshot(model).items():
        same = support.same_bits(now, before[name])
        assert same == ("relative_attention_bias" in name), name


class Mixing(nn.Module):
    """Every example's output has a part of the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y - 2 * y.mean(0)).pow(2).mean(1)


def test_a_model_that_mixes_its_examples_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Mixing(), torch.randn(4, 6)
    optimizer, _ = side_path(model)
    with pytest.raises(ReadElsewhereError, match="mixes its examples"):
        optimizer.step(lambda: model(x))


class Cumulative(nn.Module):
    """Every example's output has a part of those before it, so the first one is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).cumsum(0).pow(2).mean(1)


def test_the_last_example_is_checked_too_and_a_refusal_lasts() -> None:
    torch.manual_seed(0)
    model, x = Cumulative(), torch.randn(4, 6)
    optimizer, _ = side_path(model)
    for _ in range(2):  # whoever runs the loop again is told again
        with pytest.raises(ReadElsewhereError, match=r"loss of example 3 .* Use assignment='shared'$"):
            optimizer.step(lambda: model(x))


def test_an_accuracy_may_turn_over_by_rounding() -> None:
    """At the checked point the example is right by perturbed weights and wrong by the side path, whose sums are rounded otherwise."""
    model, ids = support.tiny_model("llama", torch.bfloat16), support.token_batch(COUNT, LENGTH)
    optimizer, side = side_path(model)
    far = 8 * EPS
    with torch.no_grad():
        (found,) = side.losses(0, [Query(0, far, 1)], lambda: losses_of(model, ids))
        (expected,) = by_weights(optimizer, side, 0, lambda: losses_of(model, ids), 1, far)
    limit = (found[0] + expected) / 2
    assert found[0] != expected
    optimizer.step(lambda: (losses_of(model, ids) > limit).float())
    assert optimizer.last is not None
    assert optimizer.last.examples == COUNT


def test_parameters_without_their_module_are_refused() -> None:
    with pytest.raises(InputError, match="every example has its direction, needs the module"):
        MeZO(list(nn.Linear(6, 6).parameters()), assignment="example")


class Captured(nn.Module):
    """Its embedding is its head, too, which no module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.tied = [self.table.weight]

    def forward(self, ids: Tensor) -> Tensor:
        logits = F.linear(self.table(ids), self.tied[0])
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)


def test_a_weight_that_no_module_owns_is_noticed() -> None:
    torch.manual_seed(0)
    model, ids = Captured(), torch.randint(20, (4, 7))
    with pytest.raises(ReadElsewhereError, match="read on a way that the side path cannot see"):
        side_path(model)[0].step(lambda: model(ids))


class Derived(nn.Module):
    """Biases that are computed from parameters meet weights that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.layer.weight, 2 * self.layer.bias)
        h = F.layer_norm(h, (16,), self.norm.weight, 1 + self.norm.bias)
        return h.pow(2).sin().flatten(1).mean(1)


class OneByOne(nn.Module):
    """Calls its first layer for every example alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.stack([self.first(row).sin() for row in x])).pow(2).mean(1)


@pytest.mark.parametrize(
    ("kind", "shape", "left"),
    [
        (Derived, (4, 7, 6), ["layer.bias", "norm.bias"]),
        (Derived, (4, 6), ["layer.bias", "norm.bias"]),
        (OneByOne, (4, 6), ["first.bias", "first.weight"]),
    ],
)
def test_uses_that_nobody_expected_leave_tensors_out(kind: Any, shape: tuple[int, ...], left: list[str]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(shape, dtype=torch.float64)
    optimizer, side = side_path(model)
    with torch.no_grad():
        (found,) = side.losses(0, [Query(0, EPS, 1)], lambda: model(x))
        assert found == pytest.approx(by_weights(optimizer, side, 0, lambda: model(x), 4), rel=1e-6)
    assert [tensor.name for tensor in optimizer.tuned if tensor.id in side.left_out] == left
    with pytest.warns(UserWarning, match="have no side path"):
        optimizer.step(lambda: model(x))


class Optional(nn.Module):
    """Has no side path for a part that only some minibatches go through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.tensor(1.5))
        self.wanted = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y * self.scale if self.wanted else y).pow(2).mean(1)


def test_what_turns_out_later_to_have_no_side_path_is_named_then() -> None:
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(4, 6)
    optimizer, _ = side_path(model)
    with pytest.warns(UserWarning, match="took no part in the first step .*scale"):
        optimizer.step(lambda: model(x))
    model.wanted = True
    with pytest.warns(UserWarning, match=r"have no side path in this model \(scale\)"):
        optimizer.step(lambda: model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x))


def test_owners_that_do_not_fit_the_input_are_told() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)

    def closure() -> Tensor:
        with examples_at(torch.arange(COUNT).repeat(2)):
            return losses_of(model, ids)

    with pytest.raises(InputError, match=r"examples_at\(\(10, 1\)\) does not fit"):
        side_path(model)[0].step(closure)


def test_a_loss_that_ends_not_far_away_is_compared_nearer() -> None:
    """In float16 a loss may be finite at eps and not at the larger scale of the first step's comparison."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6), torch.randn(4, 6)
    optimizer, side = side_path(model)

    def losses() -> Tensor:
        return model(x).pow(2).mean(1)

    with torch.no_grad():
        clean = losses()
        found = side.losses(0, [Query(0, scale * EPS, 1) for scale in (1, -1, 8)], losses)
    near, far = max(abs(own[0] - float(clean[0])) for own in found[:2]), abs(found[2][0] - float(clean[0]))
    assert near < far / 2
    bound = torch.tensor([far / 2, math.inf, math.inf, math.inf])
    optimizer.step(lambda: losses().where((losses() - clean).abs() < bound, math.inf))
    assert optimizer.last is not None
    assert not math.isnan(optimizer.last.coefficients[0])


class Exotic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix @ self.matrix.T + torch.eye(6), x.T).T.pow(2).mean(1)


def test_a_model_without_any_side_path_is_refused() -> None:
    model = Exotic()
    with pytest.raises(InputError, match="no tuned tensor has a side path"):
        side_path(model)[0].step(lambda: model(torch.randn(4, 6)))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses.mean(), "return their losses, shape"),
        (lambda losses: losses[:, None], "return their losses, shape"),
        (lambda losses: "high", "return their losses, shape"),
        (lambda losses: losses[:3], "losses of 3 examples, and what a tuned weight meets first has 5 rows"),
    ],
    ids=["scalar", "matrix", "text", "too_few"],
)
def test_another_return_value_is_refused(returned: Any, message: str) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    with pytest.raises(TypeError, match=message):
        side_path(model)[0].step(lambda: returned(losses_of(model, ids)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation": "copy"}, "every example has a direction of its own"),
        ({"assignment": "examples"}, "unknown assignment"),
        ({"rank": -1}, "rank"),
        ({"assignment": "shared", "refresh": 5}, "refresh is of low-rank directions"),
        ({"normalize": "rank"}, "compares the probes of a step"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO(support.tiny_model("llama"), **{"assignment": "example", **settings})


class Beside(nn.Module):
    """Layers that also work on something which belongs to no example, a vector."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.layer, self.beside, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.register_buffer("vector", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            beside = self.beside(self.vector) + self.norm(self.vector)
            return (self.layer(x) + beside).pow(2).mean(1)
        return (self.layer(x) + self.beside(self.vector) + self.norm(self.vector)).pow(2).mean(1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_what_meets_a_vector_has_no_side_path(first: bool) -> None:
    torch.manual_seed(0)
    model, x = Beside(first), torch.randn(4, 6)
    optimizer, side = side_path(model)
    optimizer.step(lambda: model(x))
    left = {optimizer.tuned[i].name for i in side.left_out}
    assert left == {"beside.weight", "beside.bias", "norm.weight", "norm.bias"}


class Flattened(nn.Module):
    """Its second layer is given the tokens of all examples in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(-1, 6)).view(x.shape).pow(2).mean((1, 2))


def test_a_minibatch_of_single_tokens_says_nothing_of_the_kind_of_places() -> None:
    torch.manual_seed(0)
    model = Flattened()
    optimizer, side = side_path(model)
    for length in (1, 3, 1, 2):
        x = torch.randn(4, length, 6)
        optimizer.step(lambda x=x: model(x))
        assert not side.left_out


class Chosen(nn.Module):
    """Its second layer is given some of the tokens, of one example or of another, as an expert is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.first(x)
        flat = y.reshape(-1, 6)
        return (
            (y + torch.zeros_like(flat).index_copy(0, tokens, self.second(flat[tokens])).view(x.shape))
            .pow(2)
            .mean((1, 2))
        )


@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_a_choice_of_as_many_tokens_as_there_are_examples_is_not_taken_for_them() -> None:
    torch.manual_seed(0)
    model, x = Chosen(), torch.randn(4, 3, 6)
    optimizer, side = side_path(model)
    optimizer.step(lambda: model(x, torch.arange(12)))
    assert not side.left_out
    optimizer.step(lambda: model(x, torch.tensor([0, 1, 2, 4])))
    assert {optimizer.tuned[i].name for i in side.left_out} >= {"second.weight"}


class Unusual(nn.Module):
    """Uses of weights that a side path does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.table = nn.Embedding(8, 6, max_norm=1e6)
        self.norm = nn.LayerNorm((3, 6))
        self.product = nn.Linear(6, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.norm(self.layer(x) + self.table(ids))
        y = torch.addmm(self.product.bias, y.reshape(-1, 6), self.product.weight, beta=0.5).view(x.shape)
        return y.pow(2).mean((1, 2))


@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_unusual_uses_are_left_out() -> None:
    torch.manual_seed(0)
    model, x, ids = Unusual(), torch.randn(4, 3, 6), torch.arange(12).view(4, 3) % 8
    optimizer, side = side_path(model)
    optimizer.step(lambda: model(x, ids))
    left = {optimizer.tuned[i].name for i in side.left_out}
    assert left == {"table.weight", "norm.weight", "norm.bias", "product.weight", "product.bias"}


def test_a_model_that_writes_to_its_weights_is_refused() -> None:
    model = nn.Linear(6, 6)
    before = support.snapshot(model)

    def closure() -> Tensor:
        model.weight.mul_(0.5)
        return model(torch.ones(4, 6)).pow(2).mean(1)

    with pytest.raises(RuntimeError, match="writes to a tuned weight"):
        side_path(model)[0].step(closure)
    support.assert_same_bits(model, before)
    assert not model._forward_pre_hooks


def test_a_closure_that_is_not_deterministic_is_told_of_with_all_losses() -> None:
    model, x, noise = nn.Linear(6, 6), torch.ones(4, 6), iter(range(100))
    optimizer, _ = side_path(model)
    with pytest.warns(UserWarning, match=r"not deterministic: it returned \(.*\) and \(.*\) at the same point"):
        optimizer.step(lambda: model(x).pow(2).mean(1) + torch.tensor([0.0, 0.0, 0.0, 1e-3]) * next(noise))
