"""L5: LoRA that starts where the inputs are: A from the principal directions of each layer's inputs (EVA, Paischer et al., 2024).

``B A x`` sees of an input x its coordinates along the rows of A. Random rows see little of it; the principal directions of a few
batches see most. With A frozen, what is tuned is B, and a direction of B is a direction of the weights inside the subspace that
the inputs lie in.

peft has the same (``initialize_lora_eva_weights``). It subtracts the mean of the inputs, along which most of the gradient lies at first, goes
over the same batches until its directions stand still, and gives no promise that they do; here each batch is read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

#: The label of a token that is not to be predicted, as torch's cross-entropy has it.
IGNORED = -100
# So many directions are kept from batch to batch, times the rank: what is thrown away early might have come to matter.
_SPARE = 2
# Tokens of a batch that a layer's directions are taken from, at most.
_TOKENS = 256


@torch.no_grad()
def start_from_inputs(
    model: Any, batches: Iterable[Mapping[str, Any]], forward: Callable[[Any, Any], object] | None = None
) -> Any:
    """Let A of every LoRA layer be the principal directions of the inputs that the layer has on these batches.

    The rows of A, shape (rank, width), are the leading eigenvectors of the second moment ``sum_t x_t x_t^T`` over all tokens, not centred,
    each of the length ``sqrt(rank / (3 width))``. So ``A x`` is as large as with the A that LoRA starts from by default, whose elements have the
    variance ``1 / (3 width)``, where the subspace holds all of x; eps and learning rates of LoRA keep their meaning. B is left alone; it should be zero.
    A layer that no token entered keeps its A.

    Args:
        model: with a LoRA adapter, as :func:`~forwardtune.models.tune` or ``peft`` makes it; changed in place. Its base may be quantised.
        batches: model inputs. ``attention_mask``, shape (rows, length), or ``examples_at``, -1 for padding, says which tokens count.
        forward: runs the model on a batch; by default ``model(**batch)``.

    Returns:
        The model.

    Raises:
        InputError: it has no LoRA layer, its adapter has tensors of experts, a rank is above a layer's width, or there are no batches.
    """
    layers = lora_layers(model)
    sketches: dict[Any, Tensor] = {}
    with _watched(layers, sketches) as look_at:
        for batch in batches:
            look_at(tokens_of(batch))
            model(**batch) if forward is None else forward(model, batch)
    if not sketches:
        raise InputError("no token entered a layer with an adapter: give a few batches of the training examples")
    for layer, sketch in sketches.items():
        for a in layer.lora_A.values():
            rank, width = a.weight.shape
            a.weight.copy_(_orthonormal(sketch, a.weight) * math.sqrt(rank / (3 * width)))
    return model


def a_of(name: str) -> str:
    """The name of the A beside a B of LoRA; other names stay."""
    return name.replace(".lora_B.", ".lora_A.")


def lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and len(module.lora_A)]
    if not layers:
        raise InputError("the model has no LoRA layer whose A could start from its inputs: tune it with lora first")
    if getattr(model, "targeted_parameter_names", None):
        raise InputError(
            "experts in one tensor have no inputs of their own to start A from: leave them out of the targets of LoRA"
        )
    for layer in layers:
        for a in layer.lora_A.values():
            rank, width = a.weight.shape
            if rank > width:
                raise InputError(
                    f"a rank of {rank} is above the width {width} of a layer's inputs: lower the rank of LoRA"
                )
    return layers


def tokens_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch are no padding, shape (rows, length); None: all."""
    if "examples_at" in batch:
        return batch["examples_at"] >= 0
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None


@contextmanager
def _watched(layers: list[Any], sketches: dict[Any, Tensor]) -> Iterator[Callable[[Tensor | None], None]]:
    """Inside, forward passes add the inputs of each layer to its sketch. Yields what is told of each batch which tokens count."""
    counted: Tensor | None = None

    def look_at(which: Tensor | None) -> None:
        nonlocal counted
        counted = which

    def add(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = _rows(inputs[0], counted)
        keep = _SPARE * max(a.weight.shape[0] for a in layer.lora_A.values())
        sketches[layer] = merged(sketches.get(layer), rows, keep)

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        yield look_at
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """The inputs of the tokens that count, one below the other, evenly thinned out; float64, on the CPU."""
    flat = x.flatten(0, -2)
    if counted is not None and len(flat) == counted.numel():
        flat = flat[counted.flatten().to(flat.device)]
    return flat[:: -(-len(flat) // _TOKENS) or 1].cpu().double()


def merged(sketch: Tensor | None, rows: Tensor, keep: int) -> Tensor:
    """The leading principal directions of both together, each as long as its singular value, shape (at most keep, width).

    From the Gram matrix of the rows, as there are fewer of them than the widths of large models.
    """
    both = rows if sketch is None else torch.cat([sketch, rows])
    _, vectors = torch.linalg.eigh(both @ both.T)  # the largest last
    return vectors[:, -keep:].flip(1).T @ both


def _orthonormal(sketch: Tensor, spare: Tensor) -> Tensor:
    """As many orthonormal rows as ``spare`` has: the sketch's directions, and where it has too few, what spare has beside them."""
    lengths = sketch.norm(dim=1, keepdim=True)
    found = (sketch / lengths)[(lengths > 1e-6 * lengths.max()).flatten()]
    rows = torch.cat([found, spare.cpu().double()])[: len(spare)]
    return torch.linalg.qr(rows.T)[0].T.to(spare)
