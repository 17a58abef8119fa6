"""L5: what an error says of LoRA layers inside a block, such as queries and values: the block runs once more by itself, with a gradient.

What these give is not added to the stream, and works by way of other tokens. But a block of attention is a function f of what it reads, h, alone. With the
errors e_t that come back to what it gives (:mod:`.way_back`), the gradient of ``B`` in ``W + s B A`` is about

    G = d/dB sum_t e_t . f(h)_t

which takes the block's own derivative, and no other's. Blocks are asked one after the other, when the errors are known, so what is kept of a forward pass is
what each of them read, ``tokens x width`` numbers.

Source: local errors in the place of those that are propagated back, Nokland and Eidnes, "Training Neural Networks with Local Error Signals", 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from .late import row_of_layers
from .shelf import Shelf
from .way_back import first_of, without_cache


@dataclass
class Block:
    """A part of a layer of the row, such as its attention.

    Attributes:
        module: reads the stream, and gives something of its shape.
        end: the layer of the row that it is part of.
        layers: LoRA layers in it.
        called: what it was called with, and the shape of what it gave, in the last forward pass inside :func:`noting`.
    """

    module: nn.Module
    end: nn.Module
    layers: list[Any] = field(default_factory=list)
    called: tuple[tuple[Any, ...], dict[str, Any], torch.Size] | None = None

    def b(self) -> list[nn.Parameter]:
        return [b.weight for layer in self.layers for b in layer.lora_B.values()]

    def gradient(self, errors: Tensor, at: Tensor, tokens: int) -> None:
        """Let each B have G as its gradient, or none where the block did not run on these tokens.

        Args:
            errors: e of some tokens, shape (some, width), float32.
            at: which they are, of so many ``tokens`` one after the other.
        """
        called, self.called = self.called, None
        if called is None or called[2].numel() != tokens * errors.shape[1]:
            for b in self.b():
                b.grad = None
            return
        args, kwargs, shape = called
        size = errors.abs().amax().clamp(min=1e-30)  # or half precision has none of their small numbers
        before = [b.requires_grad for b in self.b()]
        try:
            with torch.enable_grad():
                for b in self.b():
                    b.requires_grad_(True)
                given = first_of(self.module(*args, **kwargs))
                e = torch.zeros(tokens, errors.shape[1], device=given.device, dtype=given.dtype)
                e[at.to(e.device)] = (errors / size).to(e)
                found = torch.autograd.grad(given, self.b(), e.view(shape), allow_unused=True)
        finally:
            for b, had in zip(self.b(), before, strict=True):
                b.requires_grad_(had)
        for b, g in zip(self.b(), found, strict=True):
            b.grad = None if g is None or not bool(g.isfinite().all()) else g * size.to(g)


def blocks_of(model: nn.Module, layers: Iterable[Any], ends: Sequence[nn.Module]) -> list[Block]:
    """The parts of these layers of the row that such LoRA layers lie in."""
    names = {module: name for name, module in model.named_modules()}
    row = {model.get_submodule(name): name for name in row_of_layers(model)}
    found: dict[nn.Module, Block] = {}
    for layer in layers:
        for end in ends:
            start = f"{row[end]}."
            if names[layer].startswith(start):
                module = end.get_submodule(names[layer].removeprefix(start).partition(".")[0])
                found.setdefault(module, Block(module, end)).layers.append(layer)
    return [block for block in found.values() if block.module not in block.layers]


@contextmanager
def noting(blocks: Iterable[Block], shelf: Shelf) -> Iterator[None]:
    """Inside, a forward pass notes what each block is called with: what has the shape of what it gives, which is its own, on the shelf. A cache is left out, as it has the
    tokens already."""

    def note(block: Block, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = first_of(output)
        if isinstance(given, Tensor):

            def kept(name: str | int, value: Any) -> Any:
                own = isinstance(value, Tensor) and value.shape == given.shape
                return shelf.keep((block.module, name), value) if own else _plain(value)

            noted = tuple(kept(*pair) for pair in enumerate(args)), {n: kept(n, value) for n, value in kwargs.items()}
            block.called = (*noted, given.shape)

    handles = [block.module.register_forward_hook(partial(note, block), with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def able(blocks: Iterable[Block], width: int) -> list[Block]:
    """Those of the blocks that were just watched which run by themselves and have a derivative; a warning says of the others that there are some."""
    blocks, found = list(blocks), []
    why = ""
    for block in blocks:
        tokens = block.called[2].numel() // width if block.called is not None else 0
        try:
            block.gradient(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels without a backward pass, or what reads more than the stream, such as keys of another layer
            why = " (" + f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ") + ")"
            continue
        if all(b.grad is not None for b in block.b()):
            found.append(block)
    if len(found) < len(blocks):
        warn(
            f"{len(blocks) - len(found)} of {len(blocks)} blocks have no derivative by themselves{why}: B of LoRA in them starts at zero"
        )
    return found


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else without_cache(value)
