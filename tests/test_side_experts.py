"""Experts that one tensor holds, on a side path: against perturbed weights, in every way in which transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.method.estimators import Query
from forwardtune.parameters import TunedParameters
from forwardtune.points import Copy, SidePath, side_experts

EPS, COUNT, LENGTH = 1e-2, 4, 7
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip


def tiny(kind: str, how: str, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**_SIZES, attn_implementation="eager", experts_implementation=how)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:  # some classes leave them as they were in memory
            nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_("experts" in name)
    return model.to(dtype).eval()


def losses_of(model: Any) -> Tensor:
    ids = torch.randint(5, 60, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def moved_by_weights(optimizer: MeZO, query: Query, model: Any) -> list[float]:
    weights = Copy(TunedParameters(list(optimizer.tuned), model), optimizer.noise)
    of = (query._replace(probe=query.probe + b * query.stride, stride=0) for b in range(COUNT))
    return [weights.losses(3, [point], lambda b=b: losses_of(model)[b])[0][0] for b, point in enumerate(of)]


@pytest.mark.parametrize("rank", [0, 1, 2], ids=["full", "rank_1", "rank_2"])
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@torch.no_grad()
def test_tokens_meet_their_experts_along_the_directions_of_their_examples(kind: str, how: str, rank: int) -> None:
    """Also with biases, and with slices that are (in, out), which the second class has."""
    dtype = torch.float32 if how == "grouped_mm" else torch.float64  # torch's product of groups knows no float64
    model = tiny(kind, how, dtype)
    optimizer = MeZO(model, eps=EPS, assignment="example", rank=rank, seed=3)
    side = optimizer.perturbation
    assert isinstance(side, SidePath)
    plus, minus, clean = (Query(0, scale, 1) for scale in (EPS, -EPS, 0.0))
    found = side.losses(3, [plus, minus, clean], lambda: losses_of(model))
    assert not side.left_out
    for losses, query in zip(found[:2], (plus, minus), strict=True):
        moved = [a - b for a, b in zip(losses, found[2], strict=True)]
        expected = [a - b for a, b in zip(moved_by_weights(optimizer, query, model), found[2], strict=True)]
        assert max(map(abs, expected)) > 1e-3, "directions that move nothing would prove nothing"
        assert moved == pytest.approx(expected, rel=2e-2 if dtype == torch.float32 else 1e-5, abs=1e-8)


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
@torch.no_grad()
def test_both_signs_in_one_pass(how: str) -> None:
    model = tiny("GptOss", how, torch.float32)
    optimizer = MeZO(model, lr=1e-3, eps=EPS, assignment="example", perturbation="both_signs")
    apart = MeZO(model, lr=1e-3, eps=EPS, assignment="example").evaluator
    expected = apart.losses(0, optimizer.estimator.queries(), lambda: losses_of(model))[0]
    optimizer.step(lambda: losses_of(model))
    assert optimizer.perturbation.together  # type: ignore[union-attr]
    assert optimizer.last is not None
    for losses, others in zip(zip(*[iter(optimizer.last.losses)] * COUNT, strict=True), expected, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)


@torch.no_grad()
def test_one_direction_for_all_examples() -> None:
    model = tiny("GptOss", "eager", torch.float64)
    optimizer = MeZO(model, eps=EPS, rank=1, perturbation="side_path")
    (found,), (expected,) = (
        perturbation.losses(0, [Query(0, EPS)], lambda: losses_of(model).mean())
        for perturbation in (optimizer.perturbation, Copy(optimizer.tuned, optimizer.noise))
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_experts_that_no_token_went_to_stay(tmp_path: Any) -> None:
    model = tiny("Mixtral", "grouped_mm", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):  # no token goes to the last expert
            nn.init.zeros_(parameter[-1])
            parameter[:-1].abs_()
    for module in model.modules():
        if "TopKRouter" in type(module).__name__:
            module.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    before = support.snapshot(model)
    optimizer = MeZO(model, lr=1e-3, eps=EPS, assignment="example")
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for _ in range(2):
            optimizer.step(lambda: losses_of(model))
    for name, parameter in model.named_parameters():
        if "experts" in name:
            same = [support.same_bits(a, b) for a, b in zip(parameter, before[name], strict=True)]
            assert same[-1], name
            assert not all(same), name
    again = tiny("Mixtral", "grouped_mm", torch.bfloat16)
    for name, parameter in again.named_parameters():
        parameter.data.copy_(before[name])
    replay(tmp_path / "steps.jsonl", again)
    support.assert_same_bits(again, support.snapshot(model))


class Unordered(nn.Module):
    """Its experts take tokens in an order that nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Shuffled()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.flatten(0, 1)).view(x.shape).pow(2).mean((1, 2))


class _Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.bias = nn.Parameter(torch.randn(2, 6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flip(0), self.stack[1]).flip(0) + self.bias


@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_an_order_that_cannot_be_followed_leaves_experts_out() -> None:
    torch.manual_seed(0)
    model, x = Unordered(), torch.randn(COUNT, 3, 6)
    optimizer = MeZO(model, lr=1e-3, eps=EPS, assignment="example")
    optimizer.step(lambda: model(x))
    assert [optimizer.tuned[i].name for i in optimizer.evaluator.left_out] == ["experts.stack"]


def test_rows_keep_their_owners_through_what_keeps_rows_apart() -> None:
    owner = torch.tensor([0, 1, 1])
    x = side_experts.Routed.wrap(torch.arange(6.0).view(3, 2), owner)
    for kept in (
        2 * x,
        x.chunk(2, dim=-1)[0],
        F.silu(x),
        x[..., ::2],
        x.to(torch.float64),
        x[:, None].squeeze(1),
        (x + 1).clamp(min=2),
    ):
        assert isinstance(kept, side_experts.Routed)
        assert torch.equal(kept._owner, owner)
    for moved, whose in (
        (x[torch.tensor([2, 0])], [1, 0]),
        (x[owner == 1], [1, 1]),
        (x.repeat_interleave(2, dim=0), [0, 0, 1, 1, 1, 1]),
    ):
        assert isinstance(moved, side_experts.Routed)
        assert moved._owner.tolist() == whose
    for lost in (x.flip(0), x.sum(0), x[:2], torch.cat([x, x]), x.argsort(dim=0), x.T):
        assert not isinstance(lost, side_experts.Routed)
