"""What the side path costs the host: operations a layer, waits for the device, and what is made once and kept."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import support
from forwardtune import MeZO
from forwardtune.objectives import logits_at
from forwardtune.points import owners
from forwardtune.points.owners import examples_at, owners_of
from support.launches import sharing

COUNT, LENGTH = 4, 6

# Each of them would wait for the device, if its tensors were there.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "bincount",
    "argsort",
}

VIEWS = {
    *("view", "t", "detach", "slice", "transpose", "unbind", "unsqueeze", "permute", "expand", "alias", "split"),
    *("squeeze", "select", "_unsafe_view", "lift_fresh"),
}


class Operations(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(call: Any) -> Counter[str]:
    with Operations() as operations:
        call()
    return operations.count


def losses_of(model: Any, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids)) * ids.shape[1] + ids.shape[1] - 1
    return logits_at(model, {"input_ids": ids, "positions": positions}).logsumexp(-1)


def optimizer_of(model: Any, perturbation: str = "both_signs", **settings: Any) -> MeZO:
    return MeZO(model, lr=1e-3, eps=1e-2, assignment="example", perturbation=perturbation, **settings)


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("perturbation", ["both_signs", "side_path"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_evaluation_waits_for_nothing_and_makes_nothing_twice(family, perturbation, rank) -> None:
    """After the first steps: owners of inputs like these, and where vectors stand, are known."""
    model = support.tiny_model(family)
    optimizer = optimizer_of(model, perturbation, rank=rank)
    batches = [support.token_batch(COUNT, LENGTH, seed=seed) for seed in range(4)]
    for ids in batches[:3]:
        optimizer.step(lambda ids=ids: losses_of(model, ids))
    plain = counted(lambda: losses_of(model, batches[3]))
    found = counted(lambda: optimizer.estimate(lambda: losses_of(model, batches[3])))
    assert not {name: n for name, n in (found - plain - plain).items() if name in WAITS}


@pytest.mark.parametrize(("family", "copies"), [("llama", 1), ("llama", 2), ("opt", 2)])
def test_a_projection_costs_three_small_operations_more_and_a_vector_none_or_one(family, copies) -> None:
    model = support.tiny_model(family)
    optimizer = optimizer_of(model, "both_signs" if copies == 2 else "side_path", rank=2)
    ids = support.token_batch(COUNT, LENGTH)
    for _ in range(3):
        optimizer.step(lambda: losses_of(model, ids))
    passes = 2 // copies
    plain = counted(lambda: losses_of(model, ids))
    found = counted(lambda: optimizer.estimate(lambda: losses_of(model, ids)))
    projections = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    biases = [module for module in projections if module.bias is not None]
    affine = 2 * passes * sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    products = passes * len(projections)
    more = {name: found[name] - passes * plain[name] for name in found}
    assert more["mm"] == found["addmm_"] == more["addmm_"] == products
    assert products <= more["mul_"] <= products + 2 * passes
    assert more.get("add_", 0) <= passes * len(biases)
    assert more["view"] <= 5 * products + 70 * passes
    # Of embeddings, and of all vectors and all factors together.
    assert (
        sum(n for name, n in more.items() if name not in {"mm", "addmm_", "mul_", "add_", *VIEWS})
        <= 60 * passes + affine
    )


def test_stand_ins_stay_and_follow_weights_that_are_replaced() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer = optimizer_of(model)
    optimizer.step(lambda: losses_of(model, ids))
    side: Any = optimizer.perturbation
    before = dict(side._stand_ins)
    optimizer.step(lambda: losses_of(model, ids))
    assert all(side._stand_ins[place] is stand_in for place, stand_in in before.items())
    old, _ = optimizer.evaluator.losses(9, optimizer.estimator.queries(), lambda: losses_of(model, ids))
    for ours, theirs in zip(model.parameters(), support.tiny_model("llama", seed=5).parameters(), strict=True):
        ours.data = theirs.detach().clone()
    new, _ = optimizer.evaluator.losses(9, optimizer.estimator.queries(), lambda: losses_of(model, ids))
    side._stand_ins.clear()
    assert optimizer.evaluator.losses(9, optimizer.estimator.queries(), lambda: losses_of(model, ids))[0] == new != old


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("perturbation", ["scratch", "side_path", "both_signs"])
def test_weights_that_moved_away_are_kept_alive_by_nobody(perturbation, together) -> None:
    """As when a model leaves the device after its run, and the optimizer is still there."""
    model = support.tiny_model("llama")
    settings = {} if perturbation == "scratch" else {"assignment": "example"}
    optimizer = MeZO(model, lr=1e-3, perturbation=perturbation, **settings)
    tokens = support.token_batch()

    def loss() -> Tensor:
        losses = model(input_ids=tokens).logits.float().pow(2).mean(dim=(1, 2))
        return losses if settings else losses.mean()

    with sharing() if together else nullcontext():
        for _ in range(3):
            optimizer.step(loss)
        values = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        gc.collect()
        assert all(each.expired() for each in values)
        optimizer.step(loss)


def test_owners_that_are_the_same_are_one_object() -> None:
    numbers = torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])
    seen = []
    for given in (numbers, numbers.clone(), numbers.int()):
        with examples_at(given):
            seen.append(owners.declared())
    assert seen[0] is seen[1] is seen[2]
    with examples_at(numbers, 4):
        assert owners.declared() is not seen[0]
    first = seen[0]
    assert first is not None
    numbers[0, 0] = 1  # the owners have numbers of their own
    assert first.tokens[0, 0] == 0
    assert first.at(torch.tensor([2, 4])) is first.at(torch.tensor([2, 5]))
    assert first.at(torch.tensor([2, 4])).tokens.tolist() == [[1, 2]]
    for k in range(40):
        owners_of(torch.tensor([[k]]), k + 1)
    assert len(owners._kept) <= 16
