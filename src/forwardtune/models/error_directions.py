"""L5: LoRA that starts where the errors are: A from the part of each layer's inputs that goes with what the model gets wrong.

The gradient of a layer's weight is a sum of products, of what comes back to its output and of its input. What comes back to the
input of the vocabulary head needs no backward pass through the model: it is the gradient e of the loss with respect to that input, ``W^T (p - y)`` for
a likelihood. Every layer before adds to that input, directly or through others, so ``sum_t e_t x_t^T``, over the tokens t that
predict an answer, has about the rows of the gradient. Their span is small (of a choice between two words, one direction beside the mean), and
in so few dimensions forward passes alone find their way.

Source: the paths that lead straight to the head are the "logit lens"; LoRA-GA (Wang et al., 2024) starts from the gradient itself, by backpropagation.
Singular vectors by a random sketch: Halko, Martinsson and Tropp, "Finding Structure with Randomness", 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..errors import InputError
from .principal import IGNORED, lora_layers, merged
from .shelf import Shelf

# A direction counts from this share of the largest singular value on.
_LEAST = 1e-2
# Tokens of a batch that are looked at, at most.
_TOKENS = 1024


@dataclass
class _Sums:
    """Of the tokens of a layer, with inputs x (width,) and errors s (sketched).

    Attributes:
        products: ``sum s x^T``, shape (sketched, width).
        inputs, errors: ``sum x``, ``sum s``.
        square: ``sum |x|^2``.
        count: number of tokens.
        keep: how many principal directions of the inputs are kept, for rows that the errors leave free; 0: none.
        sketch: these, each as long as its singular value.
    """

    products: Tensor | float = 0.0
    inputs: Tensor | float = 0.0
    errors: Tensor | float = 0.0
    square: float = 0.0
    count: int = 0
    keep: int = 0
    sketch: Tensor | None = None

    def add(self, x: Tensor, s: Tensor) -> None:
        self.products = self.products + (s.T @ x).float()  # the largest of them
        self.inputs = self.inputs + x.sum(0)
        self.errors = self.errors + s.sum(0)
        self.square += float(x.square().sum())
        self.count += len(x)
        if self.keep:
            self.sketch = merged(self.sketch, x, self.keep)

    def rows(self, rank: int, size: float) -> Tensor:
        """A, shape (rank, width), by which a coordinate of ``A x`` is of that size: the mean input, and at right angles to it what goes with the errors, in
        no more than half of the rows where principal directions follow; zeros where that is all."""
        mean = torch.as_tensor(self.inputs) / self.count
        centred = torch.as_tensor(self.products).double() - torch.outer(torch.as_tensor(self.errors), mean)
        _, sizes, vectors = torch.linalg.svd(centred, full_matrices=False)
        found = vectors[sizes > _LEAST * sizes[0]][: rank - 1 if self.sketch is None else rank // 2]
        width, overall = len(mean), self.square / self.count
        spread = max(overall - float(mean.square().sum()), 0.0) / width  # variance along a direction, on average
        if self.sketch is None:
            both = torch.linalg.qr(torch.cat([mean[None], found]).T)[0].T
            lengths = [size / float(mean.norm()), *[size / math.sqrt(spread or 1.0)] * len(found)]
        else:
            free = rank - 1 - len(found)
            taken = torch.linalg.qr(torch.cat([mean[None], found]).T)[0]
            left = self.sketch - (self.sketch @ taken) @ taken.T
            both = torch.cat([taken.T, torch.linalg.svd(left, full_matrices=False).Vh[:free]])
            tail = max(self.square - float(self.sketch.square().sum()), 0.0) / width  # what the sketch has lost
            moments = ((self.sketch @ both[1:].T).square().sum(0) + tail) / self.count
            own = (moments - (both[1:] @ mean).square()).clamp(min=_LEAST**2 * overall / width).sqrt()
            lengths = [size / float(mean.norm()), *(size / own).tolist()]
        rows = torch.zeros(rank, width, dtype=both.dtype)
        rows[: len(both)] = both * torch.tensor(lengths, dtype=both.dtype)[:, None]
        return rows

    @property
    def usual(self) -> float:
        """The size of a coordinate of ``A x`` with the A that LoRA starts from by default."""
        return math.sqrt(self.square / self.count / torch.as_tensor(self.inputs).numel() / 3)


@dataclass
class _Seen:
    """What one forward pass showed: by layer how many tokens it read and, of those at ``places``, the inputs, shape (places, width)."""

    places: Tensor | None
    inputs: dict[Any, tuple[int, Tensor]] = field(default_factory=dict)
    head: Tensor | None = None


def _predicting(batch: Mapping[str, Any]) -> Tensor | None:
    """The tokens, one after the other, whose predictions a batch asks for, in their order; None: it does not say. The inputs of all others need not be kept until the
    errors are known."""
    found = batch.get("positions")
    if found is None:
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
            return None
        wanted = labels != IGNORED
        wanted[..., :-1] |= wanted[..., 1:].clone()  # a causal model predicts them from the token before
        found = wanted.flatten().nonzero()[:, 0]
    return found.unique() if isinstance(found, Tensor) else None


def _shown(
    model: Any, layers: list[Any], head: Any, batch: Any, losses: Any, shelf: Shelf, places: Tensor | None
) -> tuple[_Seen, Tensor, Tensor]:
    """One forward pass: what layers read, the errors (tokens, hidden), and which tokens have one."""
    with _watched(model, layers, head, shelf, places) as seen, torch.enable_grad():
        loss = losses(model, batch) if losses is not None else model(**batch).loss
        if seen.head is None or not (isinstance(loss, Tensor) and loss.requires_grad):
            raise InputError(
                "A starts from the errors of a loss that has a gradient, and this one has none: start LoRA in another way"
            )
        (found,) = torch.autograd.grad(loss.sum(), seen.head)
    errors = found.flatten(0, -2)
    return seen, errors, errors.abs().amax(1).nonzero()[:, 0]


@torch.no_grad()
def start_from_errors(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    losses: Callable[[Any, Any], Tensor] | None = None,
    *,
    fill: bool = False,
) -> Any:
    """Let A of every LoRA layer span the mean of its inputs on these batches, and what of them goes with the errors.

    The first row is along the mean mu; those after it, at right angles, span the leading right singular vectors of
    ``sum_t e_t (x_t - mu)^T``, shape (hidden, width), over the tokens t with an error e_t, the gradient of the losses with respect to the head's
    input. Of a layer whose errors span less the last rows are zero. ``A x`` is about as large along each as with the A that LoRA starts from by default.
    With ``fill`` at most half of the rows are of errors, and the others along the principal directions of the inputs; times LoRA's scale, ``A x`` has a standard
    deviation of 1 along each, so that one rate for B suits all layers, whose inputs differ in size by a factor of twenty. B is
    left alone; it should be zero. A layer whose tokens are not those of the head keeps its A.

    One forward pass a batch; the backward pass is that of the head and the loss alone, and no layer keeps anything for it.

    Args:
        model: with a LoRA adapter, as :func:`~forwardtune.models.tune` or ``peft`` makes it; changed in place. Its base may be quantised.
        batches: model inputs, with what the losses need.
        losses: ``(model, batch) -> losses``, with a gradient; by default the model's own, ``model(**batch).loss``.

    Returns:
        The model.

    Raises:
        InputError: the model has no LoRA layer, or a rank of 1, or no vocabulary head; the losses have no gradient; or there are no batches.
    """
    taken(model, batches, losses, fill=fill)
    return model


def taken(
    model: Any, batches: Iterable[Mapping[str, Any]], losses: Callable[[Any, Any], Tensor] | None, *, fill: bool
) -> set[Any]:
    """:func:`start_from_errors`; the layers whose A was taken."""
    layers, head = lora_layers(model), getattr(model, "get_output_embeddings", lambda: None)()
    ranks = {layer: [a.weight.shape[0] for a in layer.lora_A.values()] for layer in layers}
    if min(min(own) for own in ranks.values()) < 2:
        raise InputError(
            "one row of A is the mean of the inputs, and errors need others: raise the rank of LoRA to 2 or more"
        )
    if head is None:
        raise InputError("the model has no vocabulary head whose errors A could start from: start LoRA in another way")
    sums = {layer: _Sums(keep=2 * max(own) if fill else 0) for layer, own in ranks.items()}
    sketch: Tensor | None = None
    shelf = Shelf()
    for batch in batches:
        memory.trim_between(model.device)
        places = _predicting(batch)
        seen, errors, at = _shown(model, layers, head, batch, losses, shelf, places)
        others = torch.zeros(()) if places is None else ~torch.isin(at, places.to(at.device))
        if bool(others.any()):  # losses of other tokens than the batch says
            seen, errors, at = _shown(model, layers, head, batch, losses, shelf, None)
        at = at[:: -(-len(at) // _TOKENS) or 1]
        sketch = _sketch(errors.shape[1], max(max(own) for own in ranks.values())) if sketch is None else sketch
        s = errors[at].cpu().double() @ sketch
        for layer, (count, inputs) in seen.inputs.items():
            if count == len(errors) and len(at):
                rows = at if seen.places is None else torch.searchsorted(seen.places.to(at.device), at)
                sums[layer].add(inputs[rows.to(inputs.device)].cpu().double(), s)
    if not any(of.count for of in sums.values()):
        raise InputError(
            "no token with an error entered a layer with an adapter: give a few batches of the training examples"
        )
    for layer, of in sums.items():
        for name, a in layer.lora_A.items() if of.count else ():
            a.weight.copy_(of.rows(a.weight.shape[0], 1 / layer.scaling[name] if fill else of.usual))
    return {layer for layer, of in sums.items() if of.count}


def _sketch(hidden: int, rank: int) -> Tensor:
    """What errors are multiplied with, shape (hidden, fewer): products with inputs then take less memory, and keep the leading directions."""
    width = 8 * rank + 64
    if hidden <= width:
        return torch.eye(hidden, dtype=torch.float64)
    return torch.randn(hidden, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@contextmanager
def _watched(model: Any, layers: list[Any], head: Any, shelf: Shelf, places: Tensor | None) -> Iterator[_Seen]:
    """Inside, a forward pass shows the inputs of the layers, and has a gradient from the head's input on alone."""
    seen, last = _Seen(places), -1 if places is None or not len(places) else int(places[-1])

    def cut(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.head = inputs[0].detach().requires_grad_()
        return (seen.head, *inputs[1:])

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # not where a part of the model runs once more, beside the pass (:mod:`.way_back`)
            x = inputs[0].detach().flatten(0, -2)
            if places is None:
                seen.inputs[layer] = len(x), shelf.keep(layer, x)
            elif last < len(x):  # of the same tokens, maybe
                seen.inputs[layer] = len(x), shelf.keep(layer, x[places.to(x.device)])

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    handles.append(head.register_forward_pre_hook(cut))
    with untuned(model, handles):
        yield seen


@contextmanager
def untuned(model: Any, handles: Iterable[Any]) -> Iterator[None]:
    """Inside, no parameter requires grad, so what is cut begins the graph. Behind it those that did do again, and the hooks are gone."""
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in tuned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in tuned:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
