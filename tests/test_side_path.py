"""Directions of their own for every example, on a side path: against perturbed weights, and through log, export and Trainer."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.cli import main
from forwardtune.errors import InputError, LogError
from forwardtune.method.estimators import Query
from forwardtune.method.record import as_float32
from forwardtune.objectives.likelihood import option_cross_entropy
from forwardtune.parameters import TunedParameters
from forwardtune.points import Copy, ReadElsewhereError, SidePath, side_weight
from forwardtune.points.owners import Groups, Owners, examples_at
from forwardtune.tasks.batching import Layout, collate
from forwardtune.tasks.encoding import Encoded
from forwardtune.trajectory import export_trajectory, read_log
from support.logs import reseal
from support.trainers import Kill, KilledError, quiet_config

EPS, COUNT, LENGTH = 1e-2, 5, 11
# What has no side path, by the ends of the names. All other tensors of a family must have one.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "t5": ("relative_attention_bias.weight",),
    "mamba": ("A_log", ".D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"),
}


def losses_of(model: Any, ids: Tensor) -> Tensor:
    """A loss of every example, shape (rows,), in float64 or float32."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def side_path(model: nn.Module, **settings: Any) -> tuple[MeZO, SidePath]:
    optimizer = MeZO(model, **{"lr": 1e-3, "eps": EPS, "seed": 3, "assignment": "example", **settings})
    assert isinstance(optimizer.perturbation, SidePath)
    return optimizer, optimizer.perturbation


def by_weights(optimizer: MeZO, side: SidePath, step: int, closure: Any, count: int, scale: float = EPS) -> list[float]:
    """The examples' losses at weights that are perturbed along the direction of each, one after another."""
    tuned = TunedParameters([t for t in optimizer.tuned if t.id not in side.left_out], optimizer.module)
    weights = Copy(tuned, optimizer.noise)
    return [weights.losses(step, [Query(b, scale)], lambda b=b: closure()[b])[0][0] for b in range(count)]


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "rank_2"])
@pytest.mark.parametrize("family", support.FAMILIES)
def test_every_example_has_the_loss_of_its_perturbed_weights(family: str, rank: int) -> None:
    double = family not in ("mixtral", "qwen3_moe")  # torch's product for experts knows no float64
    model = support.tiny_model(family, torch.float64 if double else torch.float32)
    ids = support.token_batch(COUNT, LENGTH)
    optimizer, side = side_path(model, rank=rank)
    before = support.snapshot(model)
    with torch.no_grad():
        found = side.losses(7, [Query(0, EPS, 1), Query(0, -EPS, 1)], lambda: losses_of(model, ids))
        for losses, scale in zip(found, (EPS, -EPS), strict=True):
            expected = by_weights(optimizer, side, 7, lambda: losses_of(model, ids), COUNT, scale)
            assert losses == pytest.approx(expected, rel=1e-6 if double else 1e-5)
        moved = [abs(a - b) for a, b in zip(*found, strict=True)]
    assert min(moved) > 1e-4, "directions that move nothing would prove nothing"
    support.assert_same_bits(model, before)
    left = [tensor.name for tensor in optimizer.tuned if tensor.id in side.left_out]
    assert all(name.endswith(LEFT_OUT[family]) for name in left) if left else family not in LEFT_OUT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_up_to_its_rounding(dtype: torch.dtype) -> None:
    model, ids = support.tiny_model("llama", dtype), support.token_batch(COUNT, LENGTH)
    optimizer, side = side_path(model, eps=0.1)
    with torch.no_grad():
        (found,) = side.losses(0, [Query(0, 0.1, 1)], lambda: losses_of(model, ids))
        expected = by_weights(optimizer, side, 0, lambda: losses_of(model, ids), COUNT, 0.1)
        clean = losses_of(model, ids).tolist()
    for a, b, c in zip(found, expected, clean, strict=True):
        assert abs(a - b) < 0.2 * abs(b - c) + 0.01


def test_coefficients_are_the_derivatives_of_each_example_along_its_direction() -> None:
    model, ids = support.tiny_model("llama", torch.float64), support.token_batch(COUNT, LENGTH)
    optimizer, _ = side_path(model, eps=1e-3, rank=2)
    gradients = []
    for b in range(COUNT):
        model.zero_grad()
        losses_of(model, ids)[b].backward()
        gradients.append([tensor.parameter.grad.clone() for tensor in optimizer.tuned])
    before = [tensor.parameter.detach().clone() for tensor in optimizer.tuned]
    optimizer.step(lambda: losses_of(model, ids))
    assert optimizer.last is not None
    for b, coefficient in enumerate(optimizer.last.coefficients):
        z = [optimizer.noise.z(t.parameter, tensor=t.id, step=0, probe=b) for t in optimizer.tuned]
        along = sum(float((g * direction).sum()) for g, direction in zip(gradients[b], z, strict=True))
        assert coefficient == pytest.approx(along, rel=2e-2, abs=1e-3)  # losses are logged as float32
    for tensor, old in zip(optimizer.tuned, before, strict=True):
        step = sum(
            c * optimizer.noise.z(tensor.parameter, tensor=tensor.id, step=0, probe=b).double()
            for b, c in enumerate(optimizer.last.coefficients)
        )
        torch.testing.assert_close(tensor.parameter.detach(), old - 1e-3 / COUNT * step, rtol=1e-5, atol=1e-7)


def test_microbatches_are_the_minibatch() -> None:
    ids = support.token_batch(6, LENGTH)
    whole, parts = support.tiny_model("llama"), support.tiny_model("llama")
    first, second = side_path(whole)[0], side_path(parts)[0]
    first.step(lambda: losses_of(whole, ids))
    for piece in ids.split(2):
        second.estimate(lambda piece=piece: losses_of(parts, piece))
    second.step()
    assert second.last is not None
    assert first.last is not None
    assert second.last.examples == first.last.examples == 6
    assert second.last.losses == pytest.approx(first.last.losses, rel=1e-5)


def test_packed_and_repeated_rows_belong_to_whom_they_are_said_to() -> None:
    """Two examples in one row, and an example in two rows, have the losses of their own directions."""
    model = support.tiny_model("llama", torch.float64)
    ids = support.token_batch(4, 8)
    packed = ids.reshape(2, 16)
    mask = torch.full((2, 1, 16, 16), torch.finfo(torch.float64).min, dtype=torch.float64)
    for lo in (0, 8):
        mask[:, :, lo : lo + 8, lo : lo + 8] = torch.triu(mask[:, :, :8, :8], 1)
    positions = torch.arange(8).repeat(2, 2)
    owners = torch.arange(4).repeat_interleave(8).view(2, 16)

    def one_by_one() -> Tensor:
        return losses_of(model, ids)

    def together() -> Tensor:
        with examples_at(owners):
            logits = model(input_ids=packed, attention_mask=mask, position_ids=positions).logits
        logits = logits.view(4, 8, -1)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    def twice() -> Tensor:
        with examples_at(torch.arange(4).repeat(2)):
            return losses_of(model, ids.repeat(2, 1)).view(2, 4).mean(0)

    _, side = side_path(model, rank=1)
    with torch.no_grad():
        (expected,) = side.losses(0, [Query(0, EPS, 1)], one_by_one)
        for closure in (together, twice, lambda: (together() + one_by_one() + together()) / 3):
            (found,) = side.losses(0, [Query(0, EPS, 1)], closure)
            assert found == pytest.approx(expected, rel=1e-9)


def test_probes_of_an_example_have_directions_of_their_own() -> None:
    model, ids = support.tiny_model("llama", torch.float64), support.token_batch(3, LENGTH)
    optimizer, side = side_path(model, probes=2)
    optimizer.step(lambda: losses_of(model, ids))
    assert optimizer.last is not None
    assert len(optimizer.last.coefficients) == 6
    with torch.no_grad():
        model = support.tiny_model("llama", torch.float64)
        optimizer, side = side_path(model, probes=2)
        (found,) = side.losses(0, [Query(1, EPS, 2)], lambda: losses_of(model, ids))
        weights = Copy(optimizer.tuned, optimizer.noise)
        for b in range(3):
            ((expected,),) = weights.losses(0, [Query(2 * b + 1, EPS)], lambda b=b: losses_of(model, ids)[b])
            assert found[b] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 2, "refresh": 3},
        {"rule": "momentum", "probes": 2},
        {"clip_coefficient": 0.5},
        {"probes": 3, "normalize": "sigma"},
        {"normalize": "spread", "clip_coefficient": 1.5},
    ],
)
def test_runs_are_logged_replayed_resumed_and_exported(tmp_path: Any, settings: dict[str, Any]) -> None:
    def begin() -> tuple[Any, MeZO]:
        model = support.tiny_model("llama", torch.bfloat16)
        return model, side_path(model, **settings)[0]

    def step(model: Any, optimizer: MeZO, number: int) -> None:
        ids = support.token_batch(2 if number == 3 else COUNT, LENGTH, seed=number)  # a short minibatch among them
        optimizer.step(lambda: losses_of(model, ids))

    model, optimizer = begin()
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, optimizer)
    for number in range(3):
        step(model, optimizer, number)
    log.close()
    model, optimizer = begin()
    with StepLog.resume(path, optimizer):
        for number in range(3, 6):
            step(model, optimizer, number)
    whole, other = begin()
    for number in range(6):
        step(whole, other, number)
    support.assert_same_bits(model, support.snapshot(whole))
    assert read_log(path).records[4].coefficients == optimizer_record(other, 4, tmp_path)
    again = support.tiny_model("llama", torch.bfloat16)
    assert replay(path, again) == 6
    support.assert_same_bits(again, support.snapshot(model))
    export_trajectory(read_log(path), tmp_path / "t.safetensors")
    again = support.tiny_model("llama", torch.bfloat16)
    replay(tmp_path / "t.safetensors", again)
    support.assert_same_bits(again, support.snapshot(model))


def optimizer_record(optimizer: MeZO, step: int, tmp_path: Any) -> tuple[float, ...]:
    """The coefficients of that step as a second run saw them."""
    model = support.tiny_model("llama", torch.bfloat16)
    again = side_path(
        model,
        rank=optimizer.noise.structure.rank,
        refresh=optimizer.noise.structure.refresh,
        rule=optimizer.rule,
        probes=optimizer.estimator.probes,
        estimator=optimizer.estimator.name,
        normalize=optimizer.estimator.normalize,
        clip_coefficient=optimizer.clip_coefficient,
    )[0]
    seen: list[tuple[float, ...]] = []
    again.recorders.append(lambda record: seen.append(record.coefficients))
    for number in range(step + 1):
        ids = support.token_batch(2 if number == 3 else COUNT, LENGTH, seed=number)
        again.step(lambda ids=ids: losses_of(model, ids))
    return seen[step]


@pytest.mark.parametrize(("estimator", "probes"), [("spsa", 1), ("one_sided", 2)])
def test_fzoo_over_examples_is_the_update_of_a_plain_reference(estimator: str, probes: int) -> None:
    """``theta - lr / (B n) sum_b,k d_bk / s z_bk``, s the root mean square of all differences d: no unit of the loss is left in it."""
    moved = []
    for unit in (1.0, 2.0**-7):
        model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
        before = support.snapshot(model)
        optimizer, _ = side_path(model, estimator=estimator, probes=probes, normalize="spread", lr=2.0**-6)
        optimizer.step(lambda model=model, ids=ids, unit=unit: unit * losses_of(model, ids))
        losses = torch.tensor(optimizer.last.losses, dtype=torch.float64).view(-1, COUNT)
        d = (losses[0] - losses[1])[:, None] / 2 if estimator == "spsa" else (losses[1:] - losses[0]).T
        c = (d / d.square().mean().sqrt()).flatten()
        assert optimizer.last.coefficients == pytest.approx(c.tolist(), rel=1e-12)
        for tensor in optimizer.tuned:
            address = {"tensor": tensor.id, "step": 0}
            zs = [optimizer.noise.z(tensor.parameter, probe=k, **address) for k in range(len(c))]
            expected = before[tensor.name] - 2.0**-6 * sum(a * z for a, z in zip(c.tolist(), zs, strict=True)) / len(c)
            if tensor.id not in optimizer.last.unused and tensor.id not in optimizer.last.unread:
                torch.testing.assert_close(tensor.parameter.detach(), expected, rtol=0, atol=1e-6)
        moved.append(optimizer.last.coefficients)
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)  # float32 losses


def test_a_line_and_an_exported_step_are_short(tmp_path: Any) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(16, LENGTH)
    optimizer, _ = side_path(model)
    path = tmp_path / "steps.jsonl"
    with StepLog(path, optimizer):
        for _ in range(30):
            optimizer.step(lambda: losses_of(model, ids))
    lines = path.read_bytes().splitlines()
    assert max(map(len, lines[1:])) < 400
    size = export_trajectory(read_log(path), tmp_path / "t.safetensors")
    header = len(lines[0])
    assert size < 100 * 30 + header


def test_an_example_without_a_finite_loss_is_left_out() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(4, LENGTH)
    optimizer, _ = side_path(model)

    def closure() -> Tensor:
        return losses_of(model, ids).index_fill(0, torch.tensor([2]), math.nan)

    optimizer.step(closure)
    assert optimizer.last is not None
    assert [math.isnan(c) for c in optimizer.last.coefficients] == [False, False, True, False]
    there = [loss for loss in optimizer.last.losses if not math.isnan(loss)]
    assert optimizer.last.loss == pytest.approx(sum(there) / 6)
    assert not optimizer.last.skipped


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


class Sometimes(nn.Module):
    """Uses a weight in a way that has no side path, in some minibatches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        y = self.layer(x)
        return self.last(y + x @ self.layer.weight.inverse() if odd else y).pow(2).mean(1)


@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_what_a_run_found_to_have_no_side_path_is_known_when_it_goes_on(tmp_path: Any) -> None:
    x, path = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), tmp_path / "steps.jsonl"

    def steps(model: Sometimes, optimizer: MeZO, numbers: range) -> None:
        for number in numbers:
            optimizer.step(lambda number=number: model(x, odd=number == 1))

    whole, broken = Sometimes(), Sometimes()
    steps(whole, side_path(whole)[0], range(4))
    optimizer = side_path(broken)[0]
    log = StepLog(path, optimizer)
    steps(broken, optimizer, range(2))
    log.close()
    assert [record.left_out for record in read_log(path).records] == [(), (3,)]
    copied = copy.deepcopy(optimizer)
    assert copied.evaluator.left_out == {3}
    broken = Sometimes()
    optimizer = side_path(broken)[0]
    with StepLog.resume(path, optimizer):
        steps(broken, optimizer, range(2, 4))
    support.assert_same_bits(broken, support.snapshot(whole))
    assert [record.left_out for record in read_log(path).records] == [(), (3,), (), ()]


def test_owners_that_do_not_fit_the_input_are_told() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)

    def closure() -> Tensor:
        with examples_at(torch.arange(COUNT).repeat(2)):
            return losses_of(model, ids)

    with pytest.raises(InputError, match=r"examples_at\(\(10, 1\)\) does not fit"):
        side_path(model)[0].step(closure)


@pytest.mark.parametrize("rank", [0, 1, 40])
def test_autocast_agrees_up_to_its_rounding(rank: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(90, 90), nn.LayerNorm(90), nn.Linear(90, 90)).eval(), torch.randn(4, 90)

    def closure() -> Tensor:
        return model(x).float().pow(2).mean(1)

    def cast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return closure()

    _, side = side_path(model, rank=rank)
    with torch.no_grad():
        (exact,), (found,) = (side.losses(0, [Query(0, EPS, 1)], c) for c in (closure, cast))
    assert found == pytest.approx(exact, rel=2e-2)


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


def test_one_direction_of_low_rank_for_all_is_that_of_perturbed_weights() -> None:
    """LOZO's point, evaluated on weights and on the side path."""
    ids, found = support.token_batch(COUNT, LENGTH), {}
    for perturbation in ("scratch", "copy", "side_path"):
        model = support.tiny_model("llama", torch.float64)
        optimizer = MeZO(model, lr=1e-3, eps=EPS, rank=2, refresh=2, perturbation=perturbation)
        found[perturbation] = [optimizer.step(lambda model=model: losses_of(model, ids).mean()) for _ in range(3)]
    assert found["scratch"] == found["copy"]
    assert found["side_path"] == pytest.approx(found["copy"], rel=1e-6)


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


def test_adapters_have_directions_for_each_example() -> None:
    peft = pytest.importorskip("peft")
    model = support.tiny_model("llama", torch.float64)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).double().eval()
    ids = support.token_batch(COUNT, LENGTH)
    for rank in (0, 1):
        optimizer, side = side_path(model, rank=rank)
        with torch.no_grad():
            (found,) = side.losses(0, [Query(0, EPS, 1)], lambda: losses_of(model, ids))
            expected = by_weights(optimizer, side, 0, lambda: losses_of(model, ids), COUNT)
        assert not side.left_out
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_gives_outputs_another_dtype_than_weights_have(family: str) -> None:
    model, ids = support.tiny_model(family), support.token_batch(COUNT, LENGTH)
    _, side = side_path(model, eps=0.1)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(model, ids)

    queries = [Query(0, 0.1, 1), Query(0, 0.0, 1)]
    with torch.no_grad():
        rough, rough_clean = side.losses(0, queries, closure)
        exact, clean = side.losses(0, queries, lambda: losses_of(model, ids))
    assert not side.left_out
    for a, b, c, d in zip(rough, rough_clean, exact, clean, strict=True):
        assert abs((a - b) - (c - d)) < 0.2 * abs(c - d) + 0.02


def test_positions_that_all_rows_share_do_not_count_the_examples() -> None:
    """GPT-2's positions have one row, and are the first to be looked up where the embeddings of tokens are not tuned."""
    model, ids = support.tiny_model("gpt2", torch.float64), support.token_batch(COUNT, LENGTH)
    model.transformer.wte.requires_grad_(False)
    optimizer, side = side_path(model)
    with torch.no_grad():
        (found,) = side.losses(0, [Query(0, EPS, 1)], lambda: losses_of(model, ids))
        expected = by_weights(optimizer, side, 0, lambda: losses_of(model, ids), COUNT)
    assert not side.left_out
    assert found == pytest.approx(expected, rel=1e-6)


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


def test_vectors_of_double_precision_are_perturbed_in_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double(), torch.randn(4, 6, dtype=torch.float64)
    nn.init.normal_(model[1].weight)
    optimizer, side = side_path(model)
    tiny = 1e-7

    def closure() -> Tensor:
        return (model(x) ** 3).mean(1)

    with torch.no_grad():
        found, clean = side.losses(0, [Query(0, tiny, 1), Query(0, 0.0, 1)], closure)
        expected = by_weights(optimizer, side, 0, closure, 4, tiny)
    moved = [a - c for a, c in zip(found, clean, strict=True)]
    assert moved == pytest.approx([a - c for a, c in zip(expected, clean, strict=True)], rel=1e-4)


def test_factors_of_one_probe_are_kept_at_a_time_and_none_between_steps() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer, side = side_path(model, probes=3)
    most = []

    def closure() -> Tensor:
        losses = losses_of(model, ids)
        most.append(len(side.point._factors))
        return losses

    optimizer.step(closure)
    assert max(most) == 1
    assert not side.point._factors


def test_factors_are_drawn_once_for_projections_and_look_ups() -> None:
    model, ids = support.tiny_model("llama", torch.bfloat16), support.token_batch(COUNT, LENGTH)
    optimizer, side = side_path(model)
    seen = []

    def closure() -> Tensor:
        losses = losses_of(model, ids)
        seen.append(len(side.point._factors))
        return losses

    optimizer.step(closure)
    assert max(seen) == 1


def test_a_step_that_does_not_fit_float32_is_logged_as_it_was(tmp_path: Any) -> None:
    """Not that examples which have a loss have a mean: the step was skipped, and its loss is the mean of all."""
    model, ids = support.tiny_model("llama"), support.token_batch(4, LENGTH)
    optimizer, _ = side_path(model, lr=1e38)
    seen = []
    optimizer.recorders.append(seen.append)

    def closure() -> Tensor:
        return (1e4 * losses_of(model, ids)).index_fill(0, torch.tensor([2]), math.nan)

    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(closure)
    (found,) = read_log(tmp_path / "steps.jsonl").records
    assert found.skipped
    assert seen[0].skipped
    assert math.isnan(found.loss)
    assert math.isnan(seen[0].loss)


def test_a_bound_of_infinity_is_none(tmp_path: Any) -> None:
    optimizer, _ = side_path(support.tiny_model("llama"), clip_coefficient=math.inf)
    StepLog(tmp_path / "steps.jsonl", optimizer).close()
    assert "clip_coefficient" not in read_log(tmp_path / "steps.jsonl").header


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        *((1, {"examples": n}, "line 2: a field") for n in (0, -1, 4, 10**30, True, 3.0, "3", None)),
        *((1, {"losses": text}, "line 2: a field") for text in ("", "AAAA", "????", "=", 3, None, [1.0])),
        (1, {"examples": 0, "losses": ""}, "line 2: a field"),
        (0, {"eps": "small"}, "a header that is not whole"),
        (0, {"assignment": "each"}, "a header that is not whole"),
        (0, {"rank": -1}, "a header that is not whole"),
        (0, {"refresh": 0}, "a header that is not whole"),
    ],
)
def test_lines_that_hold_something_else_are_refused(
    tmp_path: Any, line: int, change: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6), torch.randn(3, 6)
    optimizer, _ = side_path(model)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: model(x).pow(2).mean(1))
    reseal(tmp_path / "steps.jsonl", lambda contents: contents[line].update(change))
    with pytest.raises(LogError, match=message):
        read_log(tmp_path / "steps.jsonl")


@pytest.mark.parametrize(("rank", "at_once"), [(0, 32), (1, 32), (2, 0)], ids=["full", "at_once", "batched"])
def test_minibatches_of_a_task_are_packed_and_read_at_some_places(
    rank: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options beside each other, examples behind each other, and a vocabulary head that sees the answers' places alone."""
    monkeypatch.setattr(side_weight, "_AT_ONCE", at_once)
    dtype = torch.float64
    model = support.tiny_model("llama", dtype)
    ids = support.token_batch(5, 12).tolist()
    lengths = [12, 4, 5, 3, 7]
    examples = [
        Encoded(row[:n], [row[:2], row[2:3]], right=(i % 2,))
        for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
    ]
    batch = collate(examples, Layout(pad=0, dtype=dtype))
    assert batch["input_ids"].shape[0] < len(examples)
    optimizer, side = side_path(model, rank=rank)

    def closure() -> Tensor:
        return option_cross_entropy(model, batch)

    with torch.no_grad():
        found, clean = side.losses(0, [Query(0, EPS, 1), Query(0, 0.0, 1)], closure)
        expected = by_weights(optimizer, side, 0, closure, len(examples))
    assert not side.left_out
    moved = [a - c for a, c in zip(found, clean, strict=True)]
    assert moved == pytest.approx([a - c for a, c in zip(expected, clean, strict=True)], rel=1e-2, abs=1e-6)


def test_owners_of_places() -> None:
    alone = Owners(torch.tensor([[1, 1, -1], [0, 0, 0]]), 2)
    assert alone.rows is not None
    assert alone.rows.tolist() == [1, 0]
    packed = Owners(torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]]), 3)
    assert packed.rows is None
    expected = [[0, 0, 1, 0], [2, 2, 2, 2]]  # padding belongs to anyone
    for lead, shape in (
        ((2, 4), (2, 4)),
        ((2, 4, 5), (2, 4, 1)),
        ((2, 5, 4), (2, 1, 4)),
        ((8,), (8,)),
        ((8, 5), (8, 1)),
    ):
        owner = packed.of(lead, torch.device("cpu"))
        assert owner is not None
        assert owner.shape == shape
        assert owner.reshape(2, 4).tolist() == expected
    for lead in ((), (2,), (2, 5), (3, 4), (2, 5, 5)):
        assert packed.of(lead, torch.device("cpu")) is None
    first, second = torch.tensor([0, 2, 7]), torch.tensor([2, 4])
    for positions, owners in ((first, [[0, 1, 2]]), (first, [[0, 1, 2]]), (second, [[1, 2]])):
        assert packed.at(positions).tokens.tolist() == owners


@pytest.mark.parametrize(
    "owner", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1, 0, 2], [1, 0, 2, 1, 0, 2], [0, 0, 2, 2, 2, 2]], ids=str
)
def test_rows_by_example_come_back_to_their_places(owner: list[int]) -> None:
    groups, x = Groups(3, torch.tensor(owner)), torch.arange(12.0).view(6, 2)
    weights = torch.tensor([1.0, 10.0, 100.0])
    y = x.clone()
    groups.add_to(y, groups.gathered(x) * weights[:, None, None])
    assert torch.equal(y, x + x * weights[torch.tensor(owner)][:, None])
    hot = groups.one_hot(x.dtype, 2)
    assert hot is not None
    assert torch.equal(hot @ weights.repeat_interleave(2), 2 * weights[torch.tensor(owner)])


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


def test_steps_after_the_first_cost_their_queries() -> None:
    model, ids, calls = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH), []
    optimizer, _ = side_path(model, probes=2)

    def closure() -> Tensor:
        calls.append(0)
        return losses_of(model, ids)

    optimizer.step(closure)
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 4
    assert not model._forward_pre_hooks


def test_a_closure_that_is_not_deterministic_is_told_of_with_all_losses() -> None:
    model, x, noise = nn.Linear(6, 6), torch.ones(4, 6), iter(range(100))
    optimizer, _ = side_path(model)
    with pytest.warns(UserWarning, match=r"not deterministic: it returned \(.*\) and \(.*\) at the same point"):
        optimizer.step(lambda: model(x).pow(2).mean(1) + torch.tensor([0.0, 0.0, 0.0, 1e-3]) * next(noise))


def test_losses_beyond_float32_keep_their_sign() -> None:
    assert as_float32((1e39, -1e39, 0.1)) == (math.inf, -math.inf, pytest.approx(0.1, rel=1e-7))


def test_the_log_says_what_the_directions_are(tmp_path: Any) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer, _ = side_path(model, rank=3, refresh=4, clip_coefficient=2.0)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: losses_of(model, ids))
    header, step = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines()[:2])
    said = {key: header[key] for key in ("assignment", "rank", "refresh", "clip_coefficient")}
    assert said == {"assignment": "example", "rank": 3, "refresh": 4, "clip_coefficient": 2.0}
    assert "coefficients" not in step
    assert step["examples"] == COUNT


def trainer_of(folder: Path, model: Any, *, labels: Any = None, given: Any = None, **settings: Any) -> Any:
    from forwardtune import MeZOTrainer

    ids = support.token_batch(12, 6).tolist()
    labels = ids if labels is None else labels
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    args = quiet_config(
        folder, **{"max_steps": 2, "learning_rate": 1e-4, "eps": 1e-3, "assignment": "example", **settings}
    )
    return MeZOTrainer(model=model, args=args, train_dataset=data, **(given or {}))


def test_labels_are_moved_where_the_model_moves_them(tmp_path: Path) -> None:
    """A class that transformers does not list among its causal models: a vision-language model, or code from a hub."""
    import transformers

    class Elsewhere(transformers.LlamaForCausalLM):
        pass

    losses = []
    for number, kind in enumerate((transformers.LlamaForCausalLM, Elsewhere)):
        model = support.tiny_model("llama")
        model.__class__ = kind
        trainer = trainer_of(tmp_path / str(number), model)
        trainer.train()
        losses.append(trainer.mezo.last.losses)
    assert losses[0] == losses[1]


def test_a_model_whose_own_loss_is_another_is_refused(tmp_path: Path) -> None:
    import transformers

    class Weighted(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
            outputs = super().forward(input_ids=input_ids, labels=labels)
            outputs.loss = 2 * outputs.loss
            return outputs

    model = support.tiny_model("llama")
    model.__class__ = Weighted
    with pytest.raises(InputError, match=r"own loss \(.*\) is not the mean cross-entropy of its labels"):
        trainer_of(tmp_path, model).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_own_losses_of_families_are_found_again(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = support.tiny_model(family, dtype)
    if family == "t5":
        model.config.decoder_start_token_id = 0
    trainer = trainer_of(tmp_path, model)
    with pytest.warns(UserWarning, match="have no side path") if family == "t5" else contextlib.nullcontext():
        trainer.train()
    assert trainer.mezo.last.examples == 4


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor gives one loss"),
        ({}, {"compute_loss_func": lambda outputs, labels, **_: outputs.loss}, "compute_loss_func gives one loss"),
    ],
)
def test_a_loss_of_the_batch_alone_is_refused(settings: Any, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, support.tiny_model("llama"), given=given, **settings)


def test_trainer_reports_the_mean_over_microbatches(tmp_path: Path) -> None:
    found = []
    for number, (size, parts) in enumerate(((4, 1), (2, 2))):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = trainer_of(tmp_path / str(number), support.tiny_model("llama"), **sizes)
        found.append(trainer.train().training_loss)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_trainer_computes_in_bfloat16(tmp_path: Path) -> None:
    found = []
    for number, bf16 in enumerate((False, True)):
        trainer = trainer_of(tmp_path / str(number), support.tiny_model("llama"), bf16=bf16, eps=0.1, max_steps=1)
        trainer.train()
        found.append(trainer.mezo.last.coefficients)
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=0.1)


def test_inspect_says_what_the_directions_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer, _ = side_path(model, rank=3, refresh=4)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: losses_of(model, ids))
    assert main(["inspect", str(tmp_path / "steps.jsonl"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["assignment"], facts["rank"], facts["refresh"]) == ("example", 3, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eps", ["auto", 1e-2])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_trainer_finds_and_checks_eps(family: str, eps: Any, tmp_path: Path) -> None:
    """In runs long enough for it. Held-out examples have one loss there."""
    settings = {"learning_rate": "auto" if eps == "auto" else 1e-4, "eps": eps, "max_steps": 1000}
    trainer = trainer_of(tmp_path, support.tiny_model(family), **settings)
    trainer.add_callback(Kill(1))
    with pytest.raises(KilledError):
        trainer.train()
    assert trainer.mezo.last.examples == 4
