"""Models as they are packaged today. Hybrids: the few weights that a parent reads from its child are copied, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.points import Scratch
from support.packaged import HYBRIDS, build

pytest.importorskip("transformers", reason="needs transformers")

# Weights that are perturbed as a whole, of all that are tuned.
COPIED = {
    "lfm2": (96, 23_824),
    "qwen3_5": (256, 38_592),
    "qwen3_next": (256, 45_056),
    "falcon_h1": (720, 50_080),
    "nemotron_h": (360, 36_032),
    "bamba": (360, 40_032),
    "jamba": (640, 54_764),
    "zamba2": (720, 45_120),
    "granitemoehybrid": (360, 71_008),
    "mamba": (1_024, 25_568),
    "mamba2": (720, 34_784),
}


def logits_at(model: nn.Module, optimizer: MeZO, ids: Tensor, scale: float) -> Tensor:
    """What the optimizer's perturbation lets the model say at a point."""
    with torch.no_grad(), optimizer.perturbation as perturbation:
        perturbation.shift(3, Query(1, scale))
        return model(input_ids=ids).logits.clone()


def logits_by_hand(model: nn.Module, optimizer: MeZO, ids: Tensor, scale: float) -> Tensor:
    """What a copy says whose weights were moved there one by one."""
    moved = copy.deepcopy(model)
    tensors = dict(moved.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for tensor in optimizer.tuned:
            own = tensors[tensor.name]
            optimizer.noise.perturb(own, own, tensor=tensor.id, step=3, probe=1, scale=scale)
        return moved(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_of_a_hybrid_only_what_its_parents_read_is_copied(family, dtype):
    model, ids = build(HYBRIDS, family, dtype), support.token_batch(2, 7)
    before = support.snapshot(model)
    optimizer = MeZO(model, lr=1e-30)
    optimizer.estimate(support.closure_for(model, ids))
    assert type(optimizer.perturbation) is Scratch
    names = {optimizer.tuned[i].name.split(".")[-2] for i in optimizer.evaluator.copied}
    assert names <= {"conv", "conv1d", "dt_proj"}
    copied = sum(optimizer.tuned[i].parameter.numel() for i in optimizer.evaluator.copied)
    assert (copied, optimizer.tuned.numel) == COPIED[family]

    for scale in (1e-2, -1e-2):
        expected = logits_by_hand(model, optimizer, ids, scale)
        assert support.same_bits(logits_at(model, optimizer, ids, scale), expected)
        assert not torch.equal(expected, model(input_ids=ids).logits)
    support.assert_same_bits(model, before)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_takes_the_memory_of_its_largest_module_and_of_what_is_copied(family):
    model, ids = build(HYBRIDS, family), support.token_batch(2, 7)
    optimizer = MeZO(model, lr=1e-30)
    for _ in range(2):
        optimizer.step(support.closure_for(model, ids))
    largest = max(
        sum(p.nbytes + 63 for p in module._parameters.values() if p is not None) for module in model.modules()
    )
    assert optimizer.perturbation.nbytes <= largest + 4 * COPIED[family][0] < 4 * optimizer.tuned.numel / 2
