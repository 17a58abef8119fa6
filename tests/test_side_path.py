"""Directions of their own for every example, on a side path: the losses are those of perturbed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.objectives.likelihood import option_cross_entropy
from forwardtune.points import Copy, side_weight
from forwardtune.points.owners import Groups, Owners, examples_at
from forwardtune.tasks.batching import Layout, collate
from forwardtune.tasks.encoding import Encoded
from support.side_path import COUNT, EPS, LENGTH, by_weights, losses_of, side_path

# What has no side path, by the ends of the names. All other tensors of a family must have one.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "t5": ("relative_attention_bias.weight",),
    "mamba": ("A_log", ".D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"),
}


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


def test_one_direction_of_low_rank_for_all_is_that_of_perturbed_weights() -> None:
    """LOZO's point, evaluated on weights and on the side path."""
    ids, found = support.token_batch(COUNT, LENGTH), {}
    for perturbation in ("scratch", "copy", "side_path"):
        model = support.tiny_model("llama", torch.float64)
        optimizer = MeZO(model, lr=1e-3, eps=EPS, rank=2, refresh=2, perturbation=perturbation)
        found[perturbation] = [optimizer.step(lambda model=model: losses_of(model, ids).mean()) for _ in range(3)]
    assert found["scratch"] == found["copy"]
    assert found["side_path"] == pytest.approx(found["copy"], rel=1e-6)


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
