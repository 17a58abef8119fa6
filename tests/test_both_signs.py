"""Both sides of a probe in one forward pass: the losses of two, and two where one cannot give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO, MeZOTrainer, replay
from forwardtune.errors import InputError
from forwardtune.evaluation import find_layout, prepare
from forwardtune.method.estimators import Query
from forwardtune.objectives import option_cross_entropy
from forwardtune.points.both_signs import BothSigns
from support.examples import encoded, sharp_model
from support.trainers import quiet_config

EPS, COUNT = 1e-2, 5
PAIR = [Query(0, EPS, 1), Query(0, -EPS, 1)]


def losses_of(model: Any, ids: Tensor) -> Tensor:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def optimizers(model: nn.Module, per_pass: int = 1, **settings: Any) -> tuple[MeZO, MeZO]:
    made = [
        MeZO(
            model, lr=1e-3, eps=EPS, seed=3, assignment="example", perturbation=name, probes_per_pass=number, **settings
        )
        for name, number in (("both_signs", per_pass), ("side_path", 1))
    ]
    return made[0], made[1]


@torch.no_grad()
def evaluated(optimizer: MeZO, closure: Any, steps: int = 2, queries: Sequence[Query] = PAIR) -> list[Any]:
    """The losses of a pair, or at other points, at a step after the first, which compares."""
    for _ in range(steps - 1):
        optimizer.evaluator.losses(0, queries, closure)
    return optimizer.evaluator.losses(0, queries, closure)[0]


class Calls:
    """The rows that a model's embeddings are called with, but for positions that all rows share."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.shape[0] > 1:
            self.rows.append(output.shape[0])


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("family", support.FAMILIES)
def test_one_pass_has_the_losses_of_two(family: str, rank: int) -> None:
    model = support.tiny_model(family, torch.float64).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    ids = support.token_batch(COUNT, 11)
    both, one = optimizers(model, rank=rank)
    found, expected = (evaluated(each, lambda: losses_of(model, ids)) for each in (both, one))
    assert isinstance(both.perturbation, BothSigns)
    assert both.perturbation.together is True
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-9, atol=0)
    assert found[0] != found[1]
    calls = Calls(model)
    evaluated(both, lambda: losses_of(model, ids), steps=1)
    assert 2 * COUNT in calls.rows
    assert COUNT not in calls.rows


# Three probes, of which two share a pass: of a step in which five examples came before these.
THREE = [Query(5 * 3 + k, scale, 3) for k in range(3) for scale in (EPS, -EPS)]


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("family", support.FAMILIES)
def test_so_has_one_pass_of_several_probes(family: str, rank: int) -> None:
    model = support.tiny_model(family, torch.float64).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = support.token_batch(COUNT, 11)
    both, one = optimizers(model, rank=rank, probes=3, per_pass=2)
    found, expected = (evaluated(each, lambda: losses_of(model, ids), queries=THREE) for each in (both, one))
    assert isinstance(both.perturbation, BothSigns)
    assert both.perturbation.together is True
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-9, atol=0)
    assert len({losses[0] for losses in found}) == 6
    calls = Calls(model)
    evaluated(both, lambda: losses_of(model, ids), steps=1, queries=THREE)
    assert {4 * COUNT, 2 * COUNT} <= set(calls.rows)
    assert COUNT not in calls.rows


@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_minibatches_of_a_task_are_put_together(packed: bool, per_pass: int) -> None:
    """Rows that hold several examples, answers that take several rows, and a head that works at some places alone."""
    model = sharp_model("llama", torch.float64)
    tokenizer = support.tokenizer()
    batch = [encoded(4, 1, 3), encoded(9, 2, 2), encoded(3, 1, 1), encoded(5, 4, 1)]
    layout = replace(find_layout(model, tokenizer, batch), packed=packed)
    inputs = prepare(model, tokenizer, batch, layout)
    both, one = optimizers(model, per_pass=per_pass, probes=3)
    found, expected = (
        evaluated(each, lambda: option_cross_entropy(model, inputs), queries=THREE) for each in (both, one)
    )
    assert isinstance(both.perturbation, BothSigns)
    assert both.perturbation.together
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"refresh": 3, "fold": "refresh"}, {"rank": 3}], ids=str)
def test_steps_are_those_of_a_pass_for_each_probe(settings: dict[str, Any]) -> None:
    """Also of a microbatch behind another one, and of what waits to be folded."""
    ran = []
    for per_pass in (1, 2, 3):
        model = support.tiny_model("llama", torch.float64).eval()
        optimizer, _ = optimizers(model, per_pass=per_pass, probes=3, **settings)
        losses = []
        for step in range(4):
            for part in range(2):
                ids = support.token_batch(COUNT, 11, seed=10 * step + part)
                losses.append(optimizer.estimate(lambda model=model, ids=ids: losses_of(model, ids)))
            optimizer.apply()
        optimizer.fold()
        ran.append((losses, [p.detach().clone() for p in model.parameters()]))
    for losses, weights in ran[1:]:
        assert losses == pytest.approx(ran[0][0], rel=1e-9)
        for a, b in zip(weights, ran[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        y = self.second(self.first(x).tanh())
        return y if chosen is None else y[chosen]


def nets(closure_of: Any) -> tuple[list[Any], list[Any], BothSigns]:
    torch.manual_seed(0)
    net = Net()
    both, one = optimizers(net)
    found, expected = (evaluated(each, closure_of(net)) for each in (both, one))
    assert isinstance(both.perturbation, BothSigns)
    return found, expected, both.perturbation


def test_one_pass_serves_a_closure_that_calls_the_model_twice() -> None:
    """What meets the input first is a projection: its places, told at the first call, were taken for known at the second one, of twice the rows."""
    model = support.tiny_model("gemma3")
    for frozen in (model.get_input_embeddings(), model.model.layers[0].input_layernorm):
        frozen.requires_grad_(False)
    pairs = [support.token_batch(4, seed=seed) for seed in (0, 1)]
    optimizer = MeZO(model, lr=1e-3, assignment="example", perturbation="both_signs")
    optimizer.step(lambda: sum(model(input_ids=each).logits.pow(2).mean(dim=(1, 2)) for each in pairs))
    assert isinstance(optimizer.perturbation, BothSigns)
    assert optimizer.perturbation.together


def test_closures_that_one_pass_cannot_serve_get_two_with_the_same_bits() -> None:
    x = torch.arange(24.0).view(4, 6).sin()

    def by_parts(net: Net) -> Any:
        return lambda: net.second(net.first(x).tanh()).square().mean(1)

    def over_the_batch(net: Net) -> Any:  # the other half's rows are not those of the first
        return lambda: net(x - x.mean()).square().mean(1) + net(x[:4].clone().requires_grad_(False)).mean(1)

    def chosen(net: Net) -> Any:
        return lambda: net(x, torch.tensor([0, 1, 2, 3])).square().mean(1)

    for closure_of, together in ((by_parts, False), (over_the_batch, True), (chosen, False)):
        found, expected, perturbation = nets(closure_of)
        assert perturbation.together is together
        if not together:
            assert found == expected
        assert "forward" not in vars(perturbation.tuned.module)


def test_an_input_that_changes_between_the_sides_is_evaluated_anew() -> None:
    torch.manual_seed(0)
    net, x, drawn = Net(), torch.arange(24.0).view(4, 6).sin(), iter(range(1000))
    changes = False

    def closure() -> Tensor:
        return net(x + next(drawn) if changes else x).square().mean(1)

    both, _ = optimizers(net)
    evaluated(both, closure)
    assert isinstance(both.perturbation, BothSigns)
    assert both.perturbation.together
    changes = True
    first, second = both.evaluator.losses(0, PAIR, closure)[0]
    assert first != second
    assert (
        next(drawn) == 4
    )  # one for a pass that was no use, and one for the side that it had begun with, and the two that count


def test_an_error_of_the_closure_is_the_users() -> None:
    net, x = Net(), torch.ones(4, 6)
    both, _ = optimizers(net)

    def closure() -> Tensor:
        net(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        both.step(closure)
    assert "forward" not in vars(net)


def test_trainer_puts_both_sides_together(tmp_path: Path) -> None:
    model = support.tiny_model("llama", torch.bfloat16)
    data = [{"input_ids": row, "labels": row} for row in support.token_batch(8, 6).tolist()]
    args = quiet_config(tmp_path, max_steps=3, learning_rate=1e-3, eps=1e-2, assignment="example")
    trainer = MeZOTrainer(model=model, args=args, train_dataset=data)
    calls = Calls(model)
    trainer.train()
    assert isinstance(trainer.mezo.perturbation, BothSigns)
    assert trainer.mezo.perturbation.together
    rows = args.per_device_train_batch_size
    assert calls.rows[-2:] == [2 * rows] * 2
    base = support.tiny_model("llama", torch.bfloat16)
    assert replay(tmp_path / "steps.jsonl", base) == 3
    support.assert_same_bits(base, support.snapshot(model))


def test_directions_of_the_minibatch_are_refused() -> None:
    with pytest.raises(ValueError, match="both_signs' is of directions of examples: set assignment='example'"):
        MeZO(Net(), perturbation="both_signs")


def test_one_side_has_no_rows_to_put_together() -> None:
    with pytest.raises(InputError, match="has one side: use estimator='spsa'"):
        MeZO(
            support.tiny_model(),
            assignment="example",
            perturbation="both_signs",
            estimator="one_sided",
            probes=4,
            probes_per_pass=2,
        )
