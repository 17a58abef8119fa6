"""What a way to tune would take, from shapes alone: a forward pass on torch's meta device, whose tensors are counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..method.estimators import get_estimator, groups_of
from ..models.feedback import bytes_of_maps, step_by_shapes
from ..models.way_back import SHARE
from ..noise import Noise, Update
from ..objectives import logits_at
from ..objectives.prompts import TOKENS
from ..storage import on_the_way
from .costs import clock, passes_of_walk

# Bytes of a weight, and of the scales of its group, as quantised layers are stored (:mod:`forwardtune.models.quantised`).
_STORED = {"int8": (1.0, 0.0), "nf4": (0.5, 1 / 64 + 4 / (64 * 256)), "int4": (0.5, 4 / 32)}
# A weight's moments, by rule, are float32.
_MOMENTS = {"momentum": 4, "adam": 8}
# A matrix product alone is faster than a model with what stands between its products.
_SHARE_OF_PRODUCTS = 0.6
_TIMED_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """What a step of a way to tune would take.

    Attributes:
        bytes: at its peak, beyond what the process holds before the model is loaded.
        products: floating-point operations of the matrix products of its evaluations.
        passes: how many evaluations these are.
        perturbed: weights that its evaluations perturb, counted each time.
        updated: weights that its update moves.
    """

    bytes: int
    products: float
    passes: int
    perturbed: int
    updated: int


def estimate(model: Any, inputs: dict[str, Tensor], options: Any) -> Estimate:
    """A step of a run.

    Args:
        model: on the meta device, with what is to be tuned requiring grad.
        inputs: the longest minibatch as :func:`~forwardtune.objectives.logits_at` takes it, on the meta device.
        options: the run's settings; ``quantize`` counts the model's layers as they would be stored.
    """
    both = options.assignment == "example" or options.perturbation == "both_signs"
    activations, products = _forward(model, _stacked(inputs, options) if both else inputs)
    tuned = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    count = sum(p.numel() for p in tuned)
    weights = _stored(model, options.quantize)
    layers = [m for m in model.modules() if not (isinstance(m, nn.Embedding) or m is model.get_output_embeddings())]
    # What is computed for the layer that runs: its perturbed copy, its dense form where it is quantised.
    here = ([p for p in m.parameters(recurse=False) if options.quantize or p.requires_grad] for m in layers)
    lent = max((sum(p.nbytes for p in own) for own in here), default=0)
    scratch = sum(t.nbytes for t in tuned) if options.perturbation == "copy" else lent
    if both:
        scratch = _directions(tuned, options) + (lent if options.quantize else 0)
    offload = getattr(options, "offload", None)
    if offload:  # one module at a time visits the device
        weights = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    moments = 0 if options.rule_state == "window" else _MOMENTS.get(options.rule, 0) * count
    if offload == "cpu" or (offload and str(options.device).startswith("cuda")):  # moments live where weights do
        weights, moments = weights + on_the_way(p.nbytes for p in model.parameters()), 0
    walk = 0
    if passes_of_walk(options):
        walk = min(bytes_of_maps(model), int(SHARE * weights)) + _walk(model, inputs, options)
    queries = len(
        get_estimator(options.estimator, 1.0, options.probes, options.normalize, options.assignment).queries()
    )
    return Estimate(
        weights + max(activations + scratch + moments, walk),
        products * queries / (2 if both else 1),
        queries,
        0 if both else count * queries,
        count * options.probes,
    )


def _directions(tuned: Iterable[Tensor], options: Any) -> int:
    """Bytes of the factors of every example's directions: drawn in float32, rounded to the weights' dtype, laid out for products."""
    rank = 1 if options.rank is None else options.rank
    sides = sum((t.shape[0] + t.shape[1:].numel()) * rank * (4 + 2 * t.element_size()) for t in tuned if t.ndim > 1)
    return int(sides * groups_of(options.batch_size, options.group_size or 1))


def _stored(model: Any, quantize: str | None) -> int:
    """Bytes of the weights, with the linear layers but the head quantised if that is wanted; adapters are not."""
    total = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    if quantize is None:
        return total
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]
    each, group = _STORED[quantize]
    rows = 2 if quantize == "int8" else 0  # a scale each
    dense = sum(layer.weight.nbytes for layer in layers)
    stored = sum(layer.weight.numel() * (each + group) + layer.out_features * rows for layer in layers)
    return int(total - dense + stored)


def _stacked(inputs: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
    """Both signs of a probe in one pass, or of several, as rows below one another."""
    copies = 2 * min(options.probes, options.probes_per_pass)
    return {name: torch.cat([tensor] * copies) for name, tensor in inputs.items()}


@torch.no_grad()
def _forward(model: Any, inputs: dict[str, Tensor]) -> tuple[int, float]:
    """The most bytes of activations at once, and the operations of the products."""
    counter = FlopCounterMode(display=False)
    with counter, _Live((*model.parameters(), *model.buffers())) as live, _Fused():
        logits = logits_at(model, inputs)
        logits.sub(1.0).exp_()  # inside a loss
    return live.peak, counter.get_total_flops()


def _walk(model: Any, inputs: dict[str, Tensor], options: Any) -> int:
    """The most bytes of activations at once in a step of the walk that LoRA starts from."""
    if options.prompt_loss_weight:
        beside = torch.zeros(options.batch_size * TOKENS, dtype=torch.int64, device=inputs["positions"].device)
        inputs = {**inputs, "positions": torch.cat([inputs["positions"], beside])}
    with _Live((*model.parameters(), *model.buffers())) as live, _Fused():
        step_by_shapes(model, lambda: logits_at(model, inputs))
    return live.peak


class _Attention(torch.autograd.Function):
    """What is kept for its derivative: what it reads, and what it gives."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, given)
        return given

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(read) for read in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    """Attention without a matrix of its weights, as the kernels of real devices compute it; and of a mask without values all is true."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*(*args, *(kwargs or {}).values())[:3])
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are there at once, those of the given ones left out."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._there:
            self._there.add(place)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._there.discard(place)
        self._now -= size


@dataclass(frozen=True)
class Speed:
    """Of this machine, in a dtype.

    Attributes:
        product: seconds of a floating-point operation of a matrix product.
        perturb, update: seconds of a weight's.
    """

    product: float
    perturb: float
    update: float

    def seconds(self, one: Estimate) -> float:
        """Of a step."""
        return one.products * self.product + one.perturbed * self.perturb + one.updated * self.update


@torch.no_grad()
def speed(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Speed:
    """Time a matrix product of so many tokens, and a sweep over some weights."""
    x, w = (
        torch.ones(tokens, width, dtype=dtype, device=device),
        torch.ones(4 * width, width, dtype=dtype, device=device),
    )
    weights, noise = torch.ones(_TIMED_WEIGHTS, dtype=dtype, device=device), Noise(0)
    out = torch.empty_like(weights)
    product = _fastest(device, lambda: F.linear(x, w)) / (2 * tokens * w.numel())
    perturb = _fastest(device, lambda: noise.perturb(out, weights, step=0, probe=0, scale=1e-3, tensor=0))
    update = _fastest(device, lambda: noise.update(weights, [Update(0, (1e-9,))], tensor=0))
    return Speed(product / _SHARE_OF_PRODUCTS, perturb / _TIMED_WEIGHTS, update / _TIMED_WEIGHTS)


def _fastest(device: torch.device, work: Any) -> float:
    times = []
    for _ in range(4):
        began = clock(device)
        work()
        times.append(clock(device) - began)
    return min(times)
