"""L5: how an error behind a row of layers comes back to the layers before, learned from forward passes.

A change d of the stream before a layer changes what is behind it by ``(I + K_t) d``, with a Jacobian of each token's own. Their mean is seen where the layer runs
once more, with noise on its input. Over n tokens, with ``d_t = sigma |h_t| z_t``, signs z_t at random and |h_t| the root mean square of a token's stream,

    K = 1/n sum_t r_t z_t^T,      r_t = (f(h_t + d_t) - f(h_t) - d_t) / (sigma |h_t|)
    rho = 1 - width / n^2 sum_t |r_t|^2 / |K|^2,      at least 0

rho K, shrunk as James and Stein do by what of |K|^2 is chance, is the mean Jacobian: few tokens leave the stream as it is. An error e comes back from layer L to layer l as
``e (I + rho_L K_L) ... (I + rho_{l+1} K_{l+1})``, each token for itself: what goes to other tokens, by attention, is left out.

Source: feedback that is learned from noise, in the place of the transposed weights, is the weight mirror of Akrout et al., "Deep Learning without Weight Transport", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .late import row_of_layers

# What a block gives is added to the stream about as it is, if noise on it changes what lies behind by less than so many times its size, beside itself: then an error comes
# back to it about as to what its layer of the row reads. Feed-forward blocks behind it make that 0.4 to 0.8 in most layers of the 135M model, 1.8 at most.
_PLAIN = 2.0
# Noise, as a share of a token's stream. Terms of even order average out, as signs do.
_SIGMA = 0.1
# Tokens whose stream is so many times as large as usual, such as the first one, are left out.
_LARGE = 4.0
#: Matrices of the layers between take at most this share of the memory of the weights. Where that is not all of them, the last layers have theirs.
SHARE = 0.1


@dataclass
class _Mean:
    """Sums over tokens: of ``r z^T``, shape (width, width), and of ``|r|^2``."""

    products: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    count: int = 0

    def add(self, r: Tensor, z: Tensor) -> None:
        self.products = self.products + r.T @ z
        self.squares = self.squares + r.square().sum()
        self.count += len(r)

    def shrunk(self) -> Tensor | None:
        """``rho K``; None where that is nothing."""
        if not self.count:
            return None
        k = torch.as_tensor(self.products) / self.count
        chance = len(k) / self.count**2 * float(self.squares)
        whole = float(k.square().sum())
        return k.mul_(1 - chance / whole) if whole > chance else None


@dataclass
class _Run:
    """A layer of the row that ran: what it was called with, the stream before it and behind it, and which tokens count."""

    end: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    h: Tensor
    o: Tensor
    counted: Tensor | None

    @cached_property
    def size(self) -> Tensor:
        """Root mean square of each token's stream, shape (..., tokens, 1)."""
        return _wide(self.h).square().mean(-1, keepdim=True).sqrt()

    @cached_property
    def counts(self) -> Tensor:
        """Which tokens, one after the other, are no padding and have a stream of a usual size."""
        flat = self.size.flatten()
        fine = flat.isfinite()
        if self.counted is not None and self.counted.numel() == flat.numel():
            fine &= self.counted.flatten().to(flat.device)
        return fine & (flat < _LARGE * flat[fine].median()) if bool(fine.any()) else fine

    @torch.no_grad()
    def again(self, h: Tensor) -> Tensor:
        """What the layer makes of another stream. A cache, which has the tokens already, is left alone."""
        kept = {name: without_cache(value) for name, value in self.kwargs.items()}
        if self.args:
            return first_of(self.end(h, *self.args[1:], **kept))
        return first_of(self.end(**{**kept, "hidden_states": h}))


class WayBack:
    """The mean Jacobians between the outputs of some layers, learned in the forward passes inside :meth:`learning`.

    Args:
        model: text goes through a row of layers. Those that are part of none of them are left out, and so is what has no stream of one shape.
        layers: each gives something of the stream's shape.

    Memory: ``4 width^2`` bytes for each layer of the row between, in all at most a tenth of that of the weights. Layers whose output is not added to the stream as it
    is, such as those of post-norm models, take as much each beside that.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        names = {module: name for name, module in model.named_modules()}
        self._row = [(f"{name}.", model.get_submodule(name)) for name in row_of_layers(model)]
        self._names = names
        self._place = self._places(layers)
        self._blocks: dict[nn.Module, int] = {}
        tensors = chain(model.parameters(), model.buffers())
        self._room = SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._through: dict[int, _Mean] = {}
        self._behind: dict[nn.Module, _Mean] = {}
        self._added: set[nn.Module] = set()  # layers whose output is added to the stream as it is
        self._noise: tuple[nn.Module, Tensor] | None = None  # for whom, until it has it
        self._held = torch.empty(0)  # what of the noise the dtype holds
        self._generators: dict[tuple[torch.device, bool], torch.Generator] = {}
        self._again = False
        self._counted: Tensor | None = None

    def _places(self, layers: Iterable[nn.Module]) -> dict[nn.Module, int]:
        return {
            layer: k
            for layer in layers
            for k, (start, _) in enumerate(self._row)
            if f"{self._names[layer]}.".startswith(start)
        }

    def follow(self, blocks: Iterable[nn.Module]) -> None:
        """Learn also how errors come back to what these parts of the row's layers give, where a norm or the like stands between it and the stream."""
        self._blocks = self._places(blocks)

    @property
    def row(self) -> list[nn.Module]:
        """The layers of the row from the first to the last that one of the layers is part of."""
        places = self._place.values()
        return [end for _, end in self._row[min(places, default=0) : max(places, default=-1) + 1]]

    def end(self, layer: nn.Module) -> nn.Module | None:
        """Of the row the layer that this one is part of: errors behind it are those that come back."""
        return self._row[self._place[layer]][1] if layer in self._place else None

    def bytes(self, width: int) -> int:
        """What the matrices of a stream of that width take."""
        places = self._place.values()
        wanted = max(places, default=0) - min(places, default=0)
        return 4 * width**2 * int(min(wanted, self._room // (4 * width**2)))

    @contextmanager
    def learning(self) -> Iterator[Callable[[Tensor | None], None]]:
        """Inside, layers of the row run once more in each forward pass, without a gradient. Yields what is told of each batch which tokens count, shape (rows,
        length); None: all."""
        places = self._place.values()
        handles = [
            self._row[k][1].register_forward_hook(partial(self._look, k), with_kwargs=True)
            for k in range(min(places, default=0), max(places, default=-1) + 1)
        ]
        handles += [layer.register_forward_hook(self._with_noise) for layer in (*self._place, *self._blocks)]

        def count(tokens: Tensor | None) -> None:
            self._counted = tokens

        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()

    def maps(self, last: nn.Module) -> dict[nn.Module, Tensor]:
        """By layer M, shape (width, width), float32: an error e behind the end of ``last`` comes back to what the layer gives as ``e M``; by layer of the row that for
        what it reads. One that is left out has I, and a block that of what its layer of the row reads.

        What was learned is used up.
        """
        found: dict[nn.Module, Tensor] = {}
        m: Tensor | None = None
        for k in range(self._place.get(last, -1), -1, -1):
            for layer in (layer for layer, place in self._place.items() if place == k and layer is not last):
                back = _times(m, self._behind.pop(layer, None))
                if back is not None:
                    found[layer] = back
            for block in (block for block, place in self._blocks.items() if place == k and block not in self._added):
                back = _times(m, self._behind.pop(block, None))
                if back is not None:
                    found[block] = back
            m = _times(m, self._through.pop(k, None))
            if m is not None:
                found[self._row[k][1]] = m
        return found

    def _look(self, k: int, end: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer of the row ran: let it run with noise on its input, and on what layers in it give."""
        h, o = args[0] if args else kwargs.get("hidden_states"), first_of(output)
        if self._again or not (isinstance(h, Tensor) and isinstance(o, Tensor) and h.shape == o.shape):
            return
        if k <= max(self._place.values()) - self._room // (4 * h.shape[-1] ** 2):
            return
        run = _Run(end, args, kwargs, h.detach(), o.detach(), self._counted)
        if k > min(self._place.values()):
            self._learn(self._through.setdefault(k, _Mean()), run, None)
        within = {**self._place, **self._blocks}.items()
        for layer in [layer for layer, place in within if place == k and layer not in self._added]:
            self._learn(self._behind.setdefault(layer, _Mean()), run, layer)

    def _learn(self, mean: _Mean, run: _Run, layer: nn.Module | None) -> None:
        """Let a layer of the row run with noise on its input, or on what ``layer`` in it gives, and add what changes behind it beside the noise."""
        z = self._signs(run.h, layer in self._blocks)
        noise = _SIGMA * run.size * z
        noisy = run.h if layer is not None else (_wide(run.h) + noise).to(run.h.dtype)
        self._again, self._noise = True, None if layer is None else (layer, noise)
        self._held = _wide(noisy) - _wide(run.h)
        try:
            behind = run.again(noisy)
        finally:
            self._again, self._noise = False, None
        change = _wide(behind) - _wide(run.o) - self._held
        exact = 4 * torch.finfo(run.o.dtype).eps * (_wide(run.o).abs() + _wide(behind).abs() + _wide(run.h).abs())
        if layer is not None and bool((change.abs() <= exact).all()):
            self._added.add(layer)
            return
        r = (change / (_SIGMA * run.size).clamp(min=1e-30)).flatten(0, -2)
        fine = run.counts & r.isfinite().all(1)
        if layer in self._blocks and not mean.count and r[fine].square().mean() < _PLAIN**2:
            self._added.add(layer)
            return
        mean.add(r[fine].float(), z.flatten(0, -2)[fine])

    def _with_noise(self, layer: nn.Module, _: Any, output: Any) -> Any:
        """Add the noise that is meant for the layer, and note what of it the dtype can hold."""
        given = first_of(output)
        if self._noise is None or self._noise[0] is not layer or given.numel() != self._noise[1].numel():
            return None
        noise = self._noise[1]
        noisy = (_wide(given) + noise.view_as(given)).to(given.dtype)
        self._noise, self._held = None, (_wide(noisy) - _wide(given)).view_as(noise)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    def _signs(self, like: Tensor, of_block: bool) -> Tensor:
        """+1 and -1 at random, the same in every run, and whatever blocks there are."""
        key = like.device, of_block
        if key not in self._generators:
            self._generators[key] = torch.Generator(like.device).manual_seed(int(of_block))
        generator = self._generators[key]
        half = torch.full(like.shape, 0.5, device=like.device)
        return torch.bernoulli(half, generator=generator) * 2 - 1


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def first_of(output: Any) -> Any:
    """What a module gives beside whatever else it returns."""
    return output[0] if isinstance(output, tuple) else output


def without_cache(value: Any) -> Any:
    """An argument of a module that runs once more; a cache has the tokens already, so there is none."""
    return None if hasattr(value, "get_seq_length") else value


def _times(m: Tensor | None, mean: _Mean | None) -> Tensor | None:
    """``m (I + rho K)``; None stands for I."""
    k = mean.shrunk() if mean is not None else None
    if k is None:
        return m
    if m is None:
        return k + torch.eye(len(k), device=k.device)
    return m + m @ k.to(m.device)
