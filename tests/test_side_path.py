"""Directions of their own for every example, on a side path: against perturbed weights, and through log, export and Trainer."""

from __future__ import annotations

import contextlib
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
from forwardtune.errors import InputError
from forwardtune.method.estimators import Query
from forwardtune.parameters import TunedParameters
from forwardtune.points import Copy, ReadElsewhereError, SidePath
from forwardtune.points.owners import examples_at
from forwardtune.trajectory import export_trajectory, read_log
from support.trainers import Kill, KilledError, quiet_config

EPS, COUNT, LENGTH = 1e-2, 5, 11
# What has no side path, by the ends of the names. All other tensors of a family must have one.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "mixtral": ("experts.down_proj", "experts.gate_up_proj"),
    "qwen3_moe": ("experts.down_proj", "experts.gate_up_proj"),
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
    double = "experts.down_proj" not in LEFT_OUT.get(family, ())  # torch's product for experts knows no float64
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
        for closure in (together, twice):
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
    "settings", [{}, {"rank": 2, "refresh": 3}, {"rule": "momentum", "probes": 2}, {"clip_coefficient": 0.5}]
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
        clip_coefficient=optimizer.clip_coefficient,
    )[0]
    seen: list[tuple[float, ...]] = []
    again.recorders.append(lambda record: seen.append(record.coefficients))
    for number in range(step + 1):
        ids = support.token_batch(2 if number == 3 else COUNT, LENGTH, seed=number)
        again.step(lambda ids=ids: losses_of(model, ids))
    return seen[step]


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
    assert not optimizer.last.skipped


def test_what_has_no_side_path_is_named_and_stays() -> None:
    model = support.tiny_model("mixtral")
    before = support.snapshot(model)
    optimizer, _ = side_path(model)
    ids = support.token_batch(COUNT, LENGTH)
    with pytest.warns(UserWarning, match=r"have no side path in this model .*experts"):
        optimizer.step(lambda: losses_of(model, ids))
    optimizer.step(lambda: losses_of(model, ids))
    for name, now in support.snapshot(model).items():
        same = support.same_bits(now, before[name])
        assert same == ("experts.down_proj" in name or "experts.gate_up" in name), name


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
