"""Directions that fall on some layers or weights alone, or are longer on some: against plain references, and through the log."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.errors import InputError, LogError
from forwardtune.method.estimators import SPSA
from forwardtune.method.rules import sgd
from forwardtune.method.weighting import Weighting, gradient_norms, groups_of, in_units, layers_of, parameter_norms
from forwardtune.noise import Emphasis, LowRank, Noise
from forwardtune.noise.emphasis import LAYERS_PROBE, chosen_layers
from forwardtune.noise.philox import half_words
from forwardtune.parameters import TunedParameters
from forwardtune.points.arena import Arena
from forwardtune.trajectory import read_log
from support import assert_same_bits, snapshot

EPS, LR = 2.0**-6, 2.0**-9


class Stack(nn.Module):
    """A table, five layers and a head, in float64, so that a reference in torch has the same numbers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.head = nn.Linear(4, 1, bias=False)
        self.to(dtype).eval()

    def forward(self) -> Tensor:
        x = self.table(torch.arange(5))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return (self.head(x).double() - 1).square().mean()


def optimizer_of(model: nn.Module, **settings: Any) -> MeZO:
    return MeZO(model, **{"lr": LR, "eps": EPS, "seed": 7, **settings})


def taken(model: nn.Module, **settings: Any) -> MeZO:
    """One step."""
    optimizer = optimizer_of(model, **settings)
    if optimizer.lacks_layers:
        optimizer.measure_layers(model)
    optimizer.step(model)
    return optimizer


def reference(
    masks: Callable[[str, Tensor], Tensor | float], moved: Callable[[str, Tensor], Tensor | float] | None = None
) -> Stack:
    """A step of MeZO in plain torch, along ``mask * z``, updated by ``moved * z``."""
    model, moved = Stack(), moved or masks
    tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    base = {t.name: t.parameter.detach().clone() for t in tuned}
    z = {t.name: Noise(7).z(t.parameter, tensor=t.id, step=0, probe=0).double() for t in tuned}
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            for t in tuned:
                t.parameter.copy_(base[t.name] + sign * EPS * masks(t.name, base[t.name]) * z[t.name])
            losses.append(float(model()))
        c = (losses[0] - losses[1]) / (2 * EPS)
        for t in tuned:
            t.parameter.copy_(base[t.name] - LR * c * moved(t.name, base[t.name]) * z[t.name])
    return model


def assert_close(a: nn.Module, b: nn.Module) -> None:
    """But for the rounding of the noise, and of factors, to float32."""
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert max((x - y).abs().max().item() for x, y in zip(a.parameters(), Stack().parameters(), strict=True)) > 1e-3


# --- layers ----------------------------------------------------------------------------------------------------------


def names(*each: str) -> TunedParameters:
    return TunedParameters.from_groups([{"params": [(name, nn.Parameter(torch.ones(2))) for name in each]}])


def named_groups(*each: str) -> TunedParameters:
    parameters = [nn.Parameter(torch.ones(2)) for _ in each]
    return TunedParameters.from_groups([{"params": parameters, "param_names": list(each)}])


def test_a_layer_is_what_has_a_number_in_its_name() -> None:
    tuned = named_groups(
        "encoder.block.10.w", "encoder.block.9.w", "encoder.block.9.experts.3.w", "decoder.block.9.w", "embed.w", "norm2.w",
        "0.weight", "tail.1",
    )  # fmt: skip
    found = {tensor.name: layer for tensor, layer in zip(tuned, layers_of(tuned), strict=True)}
    assert found == {
        "0.weight": 0, "decoder.block.9.w": 1, "encoder.block.9.w": 2, "encoder.block.9.experts.3.w": 2, "encoder.block.10.w": 3,
        "tail.1": 4, "embed.w": -1, "norm2.w": -1,
    }  # fmt: skip
    assert sorted(map(len, groups_of(tuned))) == [1, 1, 1, 1, 1, 1, 2]


def test_the_layers_of_a_step_are_those_with_the_smallest_numbers() -> None:
    """And all come up equally often."""
    count, active, seen = 6, 2, []
    for step in range(600):
        halves = half_words(11, 0, step, LAYERS_PROBE, 0, 2 * count).tolist()
        numbers = [(halves[2 * i] + 65536 * halves[2 * i + 1], i) for i in range(count)]
        assert chosen_layers(11, step, count, active) == {i for _, i in sorted(numbers)[:active]}
        seen += chosen_layers(11, step, count, active)
    for layer in range(count):  # 200 expected; four standard deviations of a binomial
        assert abs(seen.count(layer) - 200) < 4 * math.sqrt(600 * (1 / 3) * (2 / 3))
    assert [sorted(chosen_layers(11, step, 30, 4)) for step in range(2)] == PINNED


PINNED = [[8, 18, 21, 25], [3, 16, 18, 27]]


def test_a_step_perturbs_and_moves_its_layers_alone() -> None:
    model = Stack()
    optimizer = taken(model, active_layers=2)
    active = chosen_layers(7, 0, 5, 2)

    def mask(name: str, weight: Tensor) -> float:
        return float(not name.startswith("layers.") or int(name.split(".")[1]) in active)

    assert_close(model, reference(mask))
    before = dict(Stack().named_parameters())
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {f"layers.{i}.{kind}" for i in range(5) for kind in ("weight", "bias") if i not in active}
    assert optimizer.last.unchanged == 3 * 20


def test_layers_that_take_no_part_take_no_scratch_memory_and_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = Noise._perturb

    def counted(self: Noise, out: Tensor, source: Tensor, tensor: int, *address: Any) -> None:
        drawn.append(tensor)
        original(self, out, source, tensor, *address)

    taken_from: list[int] = []
    take = Arena.take
    monkeypatch.setattr(Noise, "_perturb", counted)
    monkeypatch.setattr(Arena, "take", lambda self, like: (taken_from.append(like.data_ptr()), take(self, like))[1])
    model = Stack()
    optimizer = support.trusted(optimizer_of(model, active_layers=2))
    optimizer.estimate(model)
    still = {p.data_ptr() for i in set(range(5)) - chosen_layers(7, 0, 5, 2) for p in model.layers[i].parameters()}
    assert taken_from
    assert not still & set(taken_from)
    layers = [layers_of(optimizer.tuned)[tensor] for tensor in drawn]
    assert set(layers) == {-1, *chosen_layers(7, 0, 5, 2)}


@pytest.mark.parametrize("perturbation", ["copy", "side_path"])
def test_every_perturbation_evaluates_the_same_point(perturbation: str) -> None:
    a, b = Stack(), Stack()
    for settings in ({"active_layers": 2}, {"modify": "variance"}, {"active_layers": 3, "modify": "expectation"}):
        first, second = optimizer_of(a, **settings), optimizer_of(b, perturbation=perturbation, **settings)
        first.estimate(a)
        second.estimate(b)
        rounded = 1e-12 if perturbation == "side_path" else 0  # sums in another order
        assert second._pending == [pytest.approx(losses, rel=rounded, abs=0) for losses in first._pending]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("settings", [{"active_layers": 2}, {"modify": "variance"}], ids=str)
def test_directions_of_examples_fall_as_those_of_the_minibatch(settings: dict[str, Any], rank: int) -> None:
    """One example has the loss of the perturbed weights."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)).double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x.square().mean(dim=-1)

    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    model = Rows()
    optimizer = optimizer_of(model, assignment="example", rank=rank, **settings)
    optimizer.estimate(lambda: model(x))
    for example in range(3):
        moved = Rows()
        for tensor in optimizer.tuned:
            weight = moved.get_parameter(tensor.name).data
            optimizer.noise.perturb(weight, weight, tensor=tensor.id, step=0, probe=example, scale=EPS)
        assert optimizer._pending[0][example] == pytest.approx(moved(x)[example].item(), rel=1e-8)
    before = snapshot(model)
    optimizer.step()
    still = [name for name, weight in snapshot(model).items() if torch.equal(weight, before[name])]
    assert len(still) == (4 if "active_layers" in settings else 0)


# --- small weights ---------------------------------------------------------------------------------------------------


def quantile(weight: Tensor, sparsity: float) -> float:
    """The largest magnitude that stays below."""
    return float(weight.detach().abs().flatten().sort().values[round((1 - sparsity) * weight.numel()) - 1])


def test_weights_above_the_threshold_are_neither_perturbed_nor_moved() -> None:
    model, base = Stack(), Stack()
    taken(model, sparsity=0.75)

    def mask(name: str, weight: Tensor) -> Tensor | float:
        return (weight.abs() <= quantile(weight, 0.75)).double() if weight.ndim > 1 else 1.0

    assert_close(model, reference(mask))
    for (_name, now), (_, was) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        if now.ndim > 1:
            moved = now != was
            assert int(moved.sum()) == round(0.25 * now.numel())
            assert was[moved].abs().max().item() < was[~moved].abs().min().item()


def test_the_threshold_is_that_of_the_beginning_and_the_weights_are_those_of_the_moment() -> None:
    """A weight that has grown past it stays there."""
    model = Stack(torch.float32)
    optimizer = optimizer_of(model, sparsity=0.5, lr=1.0)
    limits = dict(zip((t.name for t in optimizer.tuned), optimizer.noise.emphasis.limits, strict=True))
    assert limits["head.weight"] == quantile(Stack(torch.float32).head.weight, 0.5)
    crossed = 0
    for _ in range(6):
        before = snapshot(model)
        optimizer.step(model)
        for name, limit in limits.items():
            if limit is not None:
                large = before[name].abs() > limit
                assert torch.equal(model.get_parameter(name)[large], before[name][large])
                crossed += int(large.sum()) - round(0.5 * large.numel())
    assert crossed > 0


@pytest.mark.parametrize("structure", [None, LowRank(1)], ids=["full", "low-rank"])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_pieces_and_rows_are_masked_as_the_whole(
    dtype: torch.dtype, structure: LowRank | None, monkeypatch: Any
) -> None:
    noise = Noise(3, structure=structure, emphasis=Emphasis(limits=(0.5,)))
    table = torch.linspace(-1, 1, 300).view(20, 15).to(dtype)
    address = {"tensor": 0, "step": 2, "probe": 1, "scale": 0.125}
    whole = torch.empty_like(table)
    noise.perturb(whole, table, **address)
    assert torch.equal(whole[table.abs() > 0.5], table[table.abs() > 0.5])
    plain = torch.empty_like(table)
    Noise(3, structure=structure).perturb(plain, table, **address)
    assert torch.equal(whole[table.abs() <= 0.5], plain[table.abs() <= 0.5])
    rows = torch.tensor([[19, 0], [7, 7]])
    assert torch.equal(noise.perturb_rows(table, rows, **address), whole[rows])
    in_place = table.clone()
    noise.perturb(in_place, in_place, **address)
    assert torch.equal(in_place, whole)
    monkeypatch.setattr("forwardtune.noise.emphasis._PIECE", 45)
    parts = torch.empty_like(table)
    noise.perturb(parts, table, **address)
    assert torch.equal(parts, whole)


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_are_in_units_of_an_unmodified_perturbation() -> None:
    tuned = optimizer_of(Stack()).tuned
    norms = parameter_norms(tuned)
    for group, norm in zip(groups_of(tuned), norms, strict=True):
        assert norm == pytest.approx(torch.cat([tuned[i].parameter.flatten() for i in group]).norm().item())
    lengths = in_units(tuned, norms)
    assert sum(t.parameter.numel() / lengths[t.id] ** 2 for t in tuned) == pytest.approx(tuned.numel)
    for group, norm in zip(groups_of(tuned), norms, strict=True):
        for i in group:
            assert lengths[i] / lengths[groups_of(tuned)[0][0]] == pytest.approx(norm / norms[0])
    without = in_units(tuned, [0.0, math.nan, *norms[2:]])
    assert {without[i] for group in groups_of(tuned)[:2] for i in group} == {1.0}


@pytest.mark.parametrize("modify", ["variance", "expectation"])
def test_modified_steps_are_those_of_appendix_b(modify: str) -> None:
    model = Stack()
    optimizer = taken(model, modify=modify)
    tuned = optimizer_of(Stack()).tuned
    d = {t.name: length for t, length in zip(tuned, in_units(tuned, parameter_norms(tuned)), strict=True)}
    assert max(d.values()) > 1.5 * min(d.values())
    assert optimizer.noise.emphasis.probed == tuple(1 / d[t.name] for t in tuned)
    moved = (lambda name, weight: d[name]) if modify == "variance" else (lambda name, weight: 1.0)
    assert_close(model, reference(lambda name, weight: 1 / d[name], moved))


@pytest.mark.parametrize("modify", ["variance", "expectation"])
def test_over_all_sign_vectors_the_mean_is_the_gradient_or_the_gradient_over_d(modify: str) -> None:
    """Exactly: the loss is quadratic, and every number a dyadic one."""
    d, slope, curvature = (0.5, 1.0, 4.0), (1.0, -3.0, 2.0), (2.0, 1.0, -4.0)
    emphasis = Emphasis(probed=tuple(1 / x for x in d), moved=d if modify == "variance" else ())
    signs = list(itertools.product((-1, 1), repeat=3))
    estimator = SPSA(2.0**-4, len(signs))

    def loss(z: tuple[int, ...], scale: float) -> float:
        x = [emphasis.scale(0, i, 0, scale) * z[i] for i in range(3)]
        return sum(s * a + h / 2 * a * a for s, h, a in zip(slope, curvature, x, strict=True))

    losses = [loss(signs[query.probe], query.scale) for query in estimator.queries()]
    update = sgd(0, estimator.coefficients(losses), lr=1.0)
    for i in range(3):
        (own,) = emphasis.updates(0, i, [update])
        mean = -sum(size * z[i] for size, z in zip(own.sizes, signs, strict=True))
        assert mean == (slope[i] if modify == "variance" else slope[i] / d[i])


class Slopes(nn.Module):
    """A loss that is linear in single weights, a layer each."""

    SLOPES = (3.0, -0.25, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in self.SLOPES).double()

    def forward(self) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        return sum(s * layer(one).sum() for s, layer in zip(self.SLOPES, self.layers, strict=True))  # type: ignore[return-value]


def test_gradient_norms_are_estimated_from_losses_layer_by_layer() -> None:
    """With one weight a layer and signs for directions, exactly; the weights stay."""
    model = Slopes()
    before, optimizer = (
        snapshot(model),
        optimizer_of(model, direction="rademacher", modify="variance", modify_by="gradients"),
    )
    with pytest.raises(InputError, match=r"call measure_layers\(closure\) before the first step"):
        optimizer.step(model)
    optimizer.measure_layers(model)
    assert_same_bits(model, before)
    found = [1 / x for x in optimizer.noise.emphasis.probed]
    assert [x / found[0] for x in found] == pytest.approx([1, 0.25 / 3, 2 / 3], rel=1e-9)
    optimizer.step(model)


def test_gradient_norms_of_layers_are_near_those_of_backpropagation() -> None:
    """Over four Gaussian directions an estimate is |g| times the root of chi-squared over 4: between 0.1 and 2.2 in all but one of 10,000."""
    model = Stack()
    optimizer = optimizer_of(model, modify="expectation", modify_by="gradients")
    optimizer.measure_layers(model)
    model().backward()
    tuned, measured = optimizer.tuned, [1 / x for x in optimizer.noise.emphasis.probed]
    exact = {
        i: torch.cat([tuned[j].parameter.grad.flatten() for j in group]).norm().item()
        for group in groups_of(tuned)
        for i in group
    }
    unit = in_units(tuned, [exact[group[0]] for group in groups_of(tuned)])
    ratios = [m / u for m, u in zip(measured, unit, strict=True)]
    assert max(ratios) / min(ratios) < 22
    assert max(unit) / min(unit) > 2  # so that the agreement says something


def test_estimates_of_norms_are_root_mean_squares_over_four_directions() -> None:
    tuned = named_groups("layers.0.w", "layers.1.w")
    slopes = {0: [1.0, -1.0, 2.0, 0.0], 1: [3.0, 3.0, 3.0, 3.0]}
    first: list[int] = []

    def losses(step: int, queries: Any) -> list[tuple[float, ...]]:
        first.append(step)
        return [(slopes[step - first[0]][query.probe] * query.scale,) for query in queries]

    assert gradient_norms(tuned, losses, 2.0**-3) == [math.sqrt(6 / 4), 3.0]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_header_says_where_directions_fall(tmp_path: Path) -> None:
    model = Stack(torch.bfloat16)
    optimizer = optimizer_of(model, active_layers=2, sparsity=0.5, modify="expectation")
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(model)
    header = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])
    said = {key: header[key] for key in ("active_layers", "sparsity", "modify")}
    assert said == {"active_layers": 2, "sparsity": 0.5, "modify": "expectation"}
    assert "modify_by" not in header
    assert header["emphasis"].keys() == {"layers", "active", "probed", "limits"}
    assert Emphasis.of_content(header["emphasis"]) == optimizer.noise.emphasis
    plain = Stack(torch.bfloat16)
    StepLog(tmp_path / "plain.jsonl", optimizer_of(plain)).close()
    header = json.loads((tmp_path / "plain.jsonl").read_text().splitlines()[0])
    assert not header.keys() & {"active_layers", "sparsity", "modify", "modify_by", "emphasis"}


def test_what_was_measured_is_taken_from_the_log(tmp_path: Path) -> None:
    """A resumed run evaluates nothing for it."""
    path, settings = tmp_path / "steps.jsonl", {"modify": "variance", "modify_by": "gradients"}
    model = Stack()
    optimizer = optimizer_of(model, **settings)
    optimizer.measure_layers(model)
    log = StepLog(path, optimizer)
    optimizer.step(model)
    log.close()
    again = Stack()
    resumed = optimizer_of(again, **settings)
    assert resumed.lacks_layers
    with StepLog.resume(path, resumed):
        assert resumed.noise == optimizer.noise
        resumed.step(again)
    optimizer.step(model)
    assert_same_bits(again, snapshot(model))
    base = Stack()
    replay(path, base)
    assert_same_bits(base, snapshot(model))
    assert read_log(path).steps == 2
    with pytest.raises(LogError, match="modify is 'variance' in the log, 'none' here"):
        StepLog.resume(path, optimizer_of(Stack()))


def test_a_state_has_what_was_measured_and_is_refused_elsewhere() -> None:
    settings = {"modify": "variance", "modify_by": "gradients"}
    model = Stack()
    optimizer = taken(model, **settings)
    other = optimizer_of(Stack(), **settings)
    other.load_state_dict(optimizer.state_dict())
    assert other.noise.emphasis == optimizer.noise.emphasis
    with pytest.raises(ValueError, match="use the same active_layers, sparsity and modify"):
        optimizer_of(Stack()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"active_layers": 5}, "active_layers=5 takes a part of the layers, and 5 are tuned"),
        ({"active_layers": 0}, "an integer of at least 1, got 0"),
        ({"active_layers": True}, "an integer of at least 1, got True"),
        ({"sparsity": 1.0}, "from 0 up to 1, 1 excluded, got 1.0"),
        ({"sparsity": 0.5, "rule": "sign"}, "use rule='sgd'"),
        ({"sparsity": 0.5, "perturbation": "side_path"}, "a side path multiplies with whole directions"),
        ({"sparsity": 0.5, "assignment": "example"}, "a side path multiplies with whole directions"),
        ({"modify": "varience"}, "did you mean variance"),
        ({"modify": "variance", "modify_by": "gradient"}, "did you mean gradients"),
        ({"modify_by": "gradients"}, "set modify, or leave it out"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimizer_of(Stack(), **settings)


def test_a_model_without_layers_has_no_part_of_them() -> None:
    with pytest.raises(InputError, match="and 0 are tuned"):
        MeZO(nn.ModuleDict({"one": nn.Linear(2, 2)}), active_layers=1)


def test_settings_that_are_usual_say_nothing() -> None:
    assert Weighting().settings() == {}
    assert optimizer_of(Stack()).noise.emphasis is None


# --- in Trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"modify": "variance", "modify_by": "gradients"}, {"active_layers": 1}, {"sparsity": 0.5}],
    ids=str,
)
def test_a_killed_run_of_trainer_goes_on_with_what_was_found(settings: dict[str, Any], tmp_path: Path) -> None:
    from forwardtune import MeZOTrainer
    from support.trainers import Kill, KilledError, quiet_config

    ids = support.token_batch(12, 6).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]

    def begun(folder: str, *callbacks: Any) -> Any:
        args = quiet_config(tmp_path / folder, max_steps=4, learning_rate=1e-3, eps=1e-3, **settings)
        model = support.tiny_model("llama")
        return MeZOTrainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))

    whole = begun("whole")
    whole.train()
    with pytest.raises(KilledError):
        begun("killed", Kill(2)).train()
    trainer = begun("killed")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.mezo.noise == whole.mezo.noise
    assert not trainer.mezo.lacks_layers
    assert_same_bits(trainer.model, snapshot(whole.model))
    assert whole.mezo.noise.emphasis is not None
