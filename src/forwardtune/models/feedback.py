"""L5: LoRA that starts where a walk along the errors ends: B from what forward passes alone say of its gradient.

In a transformer a layer's output is added to a stream that the head reads. So the gradient of the loss with respect to the output of the last layer
needs the head's backward pass and no other, and that of a layer before is about what comes back of it by the mean Jacobian M of what lies between, which
forward passes show (:mod:`.way_back`). With it the gradient of ``B`` in ``W + s B A`` is about

    G = s sum_t (e_t M)^T (A x_t)^T,        e_t: the gradient at the last layer's output, x_t: the layer's input, over the tokens t with an error

(exact in the last layer, where M is I). Of what lies inside a block, such as queries and values, it takes the block's own derivative, too (:mod:`.blocks`). A step
costs one forward pass, half of a step of MeZO, and attention of late layers twice; no layer keeps its activations. The direction is biased, so a walk along it is
watched on examples of which it learns nothing, and forward passes along random directions go on from where it ends.

Source: feedback that reaches layers without a backward pass is direct feedback alignment (Nokland, 2016), with random matrices in the place of the stream;
that layers share a stream which the head can read is the "logit lens" (nostalgebraist, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..errors import InputError
from .blocks import Block, able, blocks_of, noting
from .error_directions import taken, untuned
from .late import adding_to_stream, expert_stacks, late_down
from .principal import lora_layers, tokens_of
from .shelf import Shelf
from .way_back import WayBack

#: A is taken from so many batches.
FOR_A = 16
#: The walk is watched so often, and before it begins.
WATCHES = 4
_NO_LAYER = (
    "errors come back along the stream that layers add to, and no layer with an adapter does: choose late-down as the targets of LoRA, or start it in "
    "another way"
)
# After a stretch that made the loss worse, the rate is divided by this.
_SLOWER = 3.0
# By how much a step changes what a layer inside a block gives, as a share of that, times the rate.
_INSIDE = 0.5


def lacks_place(model: Any) -> str | None:
    """Why LoRA on ``late-down`` cannot start so in this model; None where it can."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return f"{type(model).__name__} has no vocabulary head that errors could come from"
    try:
        found = {name.rpartition(".")[2] for name in late_down(model)}
    except InputError:
        return f"{type(model).__name__} has no linear layers that lead from a feed-forward block back"
    stacks = {name.rpartition(".")[2] for name in expert_stacks(model)}
    return f"{type(model).__name__} has experts in one tensor of the same name" if found & stacks else None


def refuse_no_layer(model: Any) -> None:
    """Raises InputError where LoRA cannot start so, since none of its layers adds to the stream."""
    if not _adding(model):
        raise InputError(_NO_LAYER)


@dataclass
class _Walk:
    """What is tuned, and how long steps are.

    Attributes:
        layers: LoRA layers that add to the stream, in the order in which they are called.
        blocks: those that others lie in.
        optimizer: Adam over B of all of them, in float32. Its groups have a ``size``, by which the rate is multiplied.
        rate: of the next step, but for its fall.
        shelf: keeps what a forward pass shows.
        maps: by layer the matrix by which an error behind the last one's part of the row comes back (:mod:`.way_back`); where there is none, as it is.
        end: the layer of the row that the last one is part of.
        best: B where the watched loss was lowest, and that loss.
    """

    layers: list[Any]
    blocks: list[Block]
    optimizer: torch.optim.Adam
    rate: float
    shelf: Shelf
    maps: Mapping[Any, Tensor] = field(default_factory=dict)
    end: Any = None
    best: tuple[list[Tensor], float] = ([], math.inf)

    def b(self) -> list[Tensor]:
        return [b for group in self.optimizer.param_groups for b in group["params"]]

    def back_at(self, at: Any, error: Tensor) -> Tensor:
        """An error behind the end as it comes back to what a layer gives, or a layer of the row reads."""
        return error @ self.maps[at].to(error.device) if at in self.maps else error

    def seen(self, loss: float) -> None:
        """The loss after a stretch, or before the first. A worse one, or none, is undone, and what follows is slower."""
        loss = math.inf if math.isnan(loss) else loss
        if not self.best[0] or loss < self.best[1]:
            self.best = [b.detach().clone() for b in self.b()], loss
        else:
            self.back()
            self.rate /= _SLOWER

    def back(self) -> None:
        for b, best in zip(self.b(), self.best[0], strict=True):
            b.data.copy_(best)
        self.optimizer.state.clear()


@dataclass
class _Seen:
    """What one forward pass showed: of each layer what B read and, of the last, the output."""

    read: dict[Any, Tensor] = field(default_factory=dict)
    sizes: dict[Any, float] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)
    last: Tensor | None = None
    end: Tensor | None = None


@torch.no_grad()
def start_from_feedback(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    losses: Callable[[Any, Any], Tensor] | None = None,
    *,
    lowered: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 100,
    rate: float = 8e-3,
    watched: Callable[[], float] | None = None,
) -> Any:
    """Let LoRA start where so many steps along the errors end.

    A is as :func:`start_from_errors` makes it with ``fill``, of the first 16 batches. B is zero at first and takes a step of Adam a
    batch, the first 16 among them, along ``G`` of this module's page, by a rate that falls to 0. A step of all L layers together adds to an element of the
    stream ``rate`` times what these layers add to it untuned, a layer ``rate / L sqrt(sum_l |y_l|^2)`` for an input as usual (root mean squares, of the
    median token, of the outputs y).

    With ``watched``, the loss of examples that are not among the batches, the walk is watched at its beginning and after each quarter: one that made it worse is
    undone, and the rate is a third from there on. So B is where the loss is lowest, which may be zero.

    Args:
        model: with a LoRA adapter on layers that add to the stream, such as ``late-down``; changed in place. Its base may be quantised.
        batches: model inputs, with what the losses need. One that has no finite loss is left out.
        losses: ``(model, batch) -> losses``, with a gradient; by default the model's own, ``model(**batch).loss``. Their mean is lowered.
        lowered: losses in their place that the steps lower; A starts from the errors of ``losses`` alone. With those of some tokens of the prompts beside those of the
            answers (:class:`forwardtune.objectives.WithPrompts`) general text loses less.
        steps: at most; fewer if there are fewer batches.

    Returns:
        The model.

    Raises:
        InputError: as of :func:`start_from_errors`; or no layer with an adapter adds to the stream, or steps or rate are not positive.
    """
    if steps < 1 or not 0 < rate < math.inf:
        raise InputError(f"feedback takes a positive number of steps and rate, got {steps} and {rate}")
    given = iter(batches)
    first = list(islice(given, FOR_A))
    way, fed = _learned(model, first, losses)
    walk = _begun(model, first[0], losses, rate, fed, way)
    if watched is not None:
        walk.seen(watched())
    stretch = -(-steps // WATCHES)
    done = 0
    for batch in islice(chain(first, given), steps):
        for group in walk.optimizer.param_groups:
            group["lr"] = walk.rate * group["size"] * (1 - done / steps)
        _step(model, walk, batch, lowered or losses)
        done += 1
        if watched is not None and (done % stretch == 0 or done == steps):
            walk.seen(watched())
    if watched is not None and done % stretch and done < steps:
        walk.seen(watched())  # there were fewer batches
    for b in walk.b():
        b.grad = None
    return model


def _learned(model: Any, batches: list[Any], losses: Any) -> tuple[WayBack, set[Any]]:
    """How errors come back, and the layers whose A was taken, from the same forward passes."""
    way = WayBack(model, _adding(model))
    way.follow(block.module for block in _inside(model, way))
    with way.learning() as count:

        def counted(model: Any, batch: Any) -> Any:
            count(tokens_of(batch))
            return losses(model, batch) if losses is not None else model(**batch).loss

        return way, taken(model, batches, counted, fill=True)


def rehearsed(
    model: Any, longest: Any, usual: Sequence[Any], losses: Any, lowered: Any, clock: Callable[[], float]
) -> tuple[float, float]:
    """What a walk takes, tried: memory is at its peak on the longest minibatch. The adapter is as it was when it is over.

    Args:
        clock: seconds, when what was asked of the device is done.

    Returns:
        Seconds in which A and the way back were learned from the longest minibatch, and of a step on a usual one.
    """
    layers = lora_layers(model)
    adapter = [p for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]
    kept = [p.detach().clone() for p in adapter]
    try:
        began = clock()
        way, fed = _learned(model, [longest], losses)
        first = clock() - began
        walk = _begun(model, longest, losses, 1e-3, fed, way)
        steps = []
        for batch in (longest, *usual):
            began = clock()
            _step(model, walk, batch, lowered)
            steps.append(clock() - began)
        return first, median(steps[1:])
    finally:
        for p, before in zip(adapter, kept, strict=True):
            p.data.copy_(before)
            p.grad = None


def bytes_of_maps(model: Any) -> int:
    """Of what the walk takes beside the memory of inference: the matrices by which errors come back."""
    return WayBack(model, _adding(model)).bytes(model.config.get_text_config().hidden_size)


def step_by_shapes(model: Any, forward: Callable[[], Tensor]) -> None:
    """The rest of it shows in this: a forward pass that gives logits, the gradient at the head, and each block once more. On the meta device, whose values say nothing."""
    blocks = _inside(model, WayBack(model, _adding(model)))
    layers = _adding(model)
    shelf = Shelf()
    with (
        _watched(model, layers, layers[-1] if layers else None, shelf) as seen,
        noting(blocks, shelf),
        torch.enable_grad(),
    ):
        logits = forward()
        if seen.last is None:
            return
        (error,) = torch.autograd.grad(logits.logsumexp(-1).sum(), seen.last)
    at = torch.zeros(1, dtype=torch.int64, device=error.device)
    for block in blocks:
        block.gradient(error.flatten(0, -2)[:1].float(), at, error.flatten(0, -2).shape[0])


@torch.no_grad()
def _begun(model: Any, batch: Any, losses: Any, rate: float, fed: set[Any], way: WayBack | None = None) -> _Walk:
    """Which layers add to the stream, of those whose A was taken, and how long a step is."""
    layers, adding = lora_layers(model), _adding(model)
    inside = [block for block in _inside(model, way) if fed.issuperset(block.layers)] if way else []
    shelf = Shelf()
    with _watched(model, layers, None, shelf) as seen, noting(inside, shelf):
        _losses(model, batch, losses)
    adapted = [layer for layer in dict.fromkeys(seen.order) if layer in seen.sizes]
    into = [layer for layer in adapted if layer in adding and layer in fed]
    if not into:
        raise InputError(_NO_LAYER)
    inside = able(inside, model.config.get_text_config().hidden_size)
    size = math.sqrt(sum(seen.sizes[layer] ** 2 for layer in into)) / len(into)
    sizes = [(layer, size) for layer in into]
    sizes += [(layer, _INSIDE * seen.sizes[layer]) for block in inside for layer in block.layers]
    groups: list[dict[str, Any]] = [
        {"params": [b.weight for b in layer.lora_B.values()], "size": own, "lr": rate * own} for layer, own in sizes
    ]
    for b in (b for group in groups for b in group["params"]):
        b.zero_()
    optimizer = torch.optim.Adam(groups)
    memory.trim()  # of what lies around the shelf
    maps, end = (way.maps(into[-1]), way.end(into[-1])) if way else ({}, None)
    return _Walk(into, inside, optimizer, rate, shelf, maps, end)


def _inside(model: Any, way: WayBack) -> list[Block]:
    """The blocks that the other LoRA layers lie in."""
    adding = _adding(model)
    return blocks_of(model, [layer for layer in lora_layers(model) if layer not in adding], way.row)


def _adding(model: Any) -> list[Any]:
    """The LoRA layers whose output is added to the stream."""
    adding = {id(model.get_submodule(name)) for name in adding_to_stream(model)}
    return [layer for layer in lora_layers(model) if id(layer) in adding]


def _usual(x: Tensor) -> float:
    """The root mean square of the elements of the median token: some tokens have thousands of times as large ones."""
    return float(x.detach().flatten(0, -2).float().square().mean(1).median().sqrt()) or 1.0


def _losses(model: Any, batch: Any, losses: Any) -> Tensor:
    loss = losses(model, batch) if losses is not None else model(**batch).loss
    return loss.mean()


def _step(model: Any, walk: _Walk, batch: Any, losses: Any) -> None:
    """One forward pass, and a step of Adam along what it says."""
    memory.trim_between(model.device)
    if _gradient(model, walk, batch, losses):
        walk.optimizer.step()


def _gradient(model: Any, walk: _Walk, batch: Any, losses: Any) -> bool:
    """G of every B, as its gradient, from one forward pass; whether there is one."""
    last = walk.layers[-1]
    watched = _watched(model, walk.layers, last, walk.shelf, walk.end)
    with watched as seen, noting(walk.blocks, walk.shelf), torch.enable_grad():
        loss = _losses(model, batch, losses)
        if not bool(loss.isfinite()) or seen.last is None:
            return False
        behind = seen.last if seen.end is None or seen.end.numel() != seen.last.numel() else seen.end
        found, far = (e.flatten(0, -2) for e in torch.autograd.grad(loss, [seen.last, behind]))
    at = found.abs().amax(1).nonzero()[:, 0]
    errors, far = found[at].float(), far[at].float()
    if not bool(errors.isfinite().all() and far.isfinite().all()):
        return False
    for layer in walk.layers:
        e = errors if layer is last else walk.back_at(layer, far)
        for name, b in layer.lora_B.items():
            read = seen.read.get((layer, name))
            if read is None or read.flatten(0, -2).shape[0] != len(found):
                b.weight.grad = None  # of other tokens than the last layer's, this time
                continue
            x = read.flatten(0, -2)[at.to(read.device)].float()
            b.weight.grad = (layer.scaling[name] * (e.to(x.device).T @ x)).to(b.weight)
    for block in walk.blocks:
        place = block.module if block.module in walk.maps else block.end
        block.gradient(walk.back_at(place, far), at, len(found))
    return True


@contextmanager
def _watched(model: Any, layers: list[Any], last: Any, shelf: Shelf, end: Any = None) -> Iterator[_Seen]:
    """Inside, a forward pass shows what every B reads and, of a layer ``end``, what it gives, and has a gradient from the output of the last layer on alone."""
    seen = _Seen()

    def note(layer: Any, name: str) -> Callable[..., None]:
        def of(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.read[layer, name] = shelf.keep((layer, name), inputs[0])

        return of

    def after(layer: Any, _: Any, output: Tensor) -> Tensor | None:
        seen.order.append(layer)
        if last is None:
            seen.sizes[layer] = _usual(output)
        if layer is not last:
            return None
        seen.last = output.detach().requires_grad_()
        return seen.last.clone()  # models add to it in its place

    def behind(_: Any, __: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.end = output if isinstance(output, Tensor) and output.requires_grad else None

    handles: list[Any] = [layer.register_forward_hook(after) for layer in layers]
    handles += [b.register_forward_pre_hook(note(layer, name)) for layer in layers for name, b in layer.lora_B.items()]
    if end is not None:
        handles.append(end.register_forward_hook(behind))
    with untuned(model, handles):
        yield seen
