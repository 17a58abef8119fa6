"""Weights of consecutive modules, perturbed in one launch: on a GPU, launching small sweeps takes the host longer than they take the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Noise
from ..parameters import TunedTensor
from .arena import Arena
from .head import as_parameter

# A window has as many bytes as the largest module has, which one module alone would take as well, and a little more for the vectors beside
# it; or this share of the weights, where that is more, up to so many bytes.
_VECTORS, _SHARE, _MOST = 2**20, 8, 2**26


class _Window:
    """Neighbours in the order of execution.

    Attributes:
        size: bytes, with gaps for the alignment.
        served: how many of its modules asked for their weights since it was perturbed.
        wasted: how often it was perturbed for one module alone.
    """

    def __init__(self) -> None:
        self.modules: list[list[TunedTensor]] = []
        self.size = self.served = self.wasted = 0

    @functools.cached_property
    def tensors(self) -> list[TunedTensor]:
        """Each once, though modules may share it."""
        return list({tensor.id: tensor for owned in self.modules for tensor in owned}.values())

    def values_in(self, memory: Tensor, outlines: Mapping[int, Tensor], alignment: int) -> dict[int, Tensor]:
        """Its tensors one behind the other in that memory, by id."""
        values, offset = {}, 0
        with torch.inference_mode(False):  # they outlive the evaluation
            for tensor in self.tensors:
                like = outlines[tensor.id]
                piece = memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
                values[tensor.id] = as_parameter(piece, tensor)
                offset += -(-like.nbytes // alignment) * alignment
        return values


class Windows:
    """The windows of a model. The first evaluation shows in which order its modules run.

    A window is perturbed when the first of its modules is called, while no module that owns tuned weights is running, into scratch memory
    that the one before it had: kernels run in the order of their launches. A module that is called in another order, or inside another one, is
    left to whoever perturbs single tensors.

    Args:
        noise: says what can share a launch.
        arena: has the memory.
    """

    def __init__(self, noise: Noise, arena: Arena) -> None:
        self._noise, self._arena = noise, arena
        self._order: dict[int, list[TunedTensor]] | None = {}  # by module, as they were called; None: all is known
        self._window_of: dict[int, _Window] = {}  # by module
        self._now: _Window | None = None
        self._values: Mapping[int, Tensor] = {}  # of that one
        # Those of all windows and what perturbs them, for memory and sources at these addresses: made once, as they mostly stay there.
        self._made: dict[_Window, tuple[list[int], dict[int, Tensor], Callable[[int, int, float], None]]] = {}

    def begin(self, sources: Mapping[int, Tensor]) -> None:
        """An evaluation at another point begins. ``sources``: the weights, by id."""
        self.leave()
        if self._order:
            self._divide(list(self._order.items()), sources)
            self._order = None

    def leave(self) -> None:
        """Let the memory be used by others."""
        if self._now is not None:
            self._arena.release({}, poison=False)
            self._now, self._values = None, {}

    def turn_to(
        self, module: nn.Module, owned: Callable[[], list[TunedTensor]], sources: Mapping[int, Tensor],
        outlines: Mapping[int, Tensor], point: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """A module is called while no other one runs: have its weights ready, if it is in a window. ``owned``: those that could be."""
        if self._order is not None:
            self._order.setdefault(id(module), owned())
        window = self._window_of.get(id(module))
        if window is None or window is not self._now:
            self.leave()
            if window is None:
                return
            self._perturb(window, sources, outlines, point)
        window.served += 1

    def value(self, tensor: TunedTensor) -> Tensor | None:
        """The perturbed weight, if it is ready."""
        return self._values.get(tensor.id)

    def _perturb(
        self, window: _Window, sources: Mapping[int, Tensor], outlines: Mapping[int, Tensor], point: Mapping[str, Any]
    ) -> None:
        window.wasted += window.served == 1 < len(window.modules)
        if window.wasted > 8:  # its modules do not run one after the other
            self._window_of = {module: other for module, other in self._window_of.items() if other is not window}
            return
        tensors = window.tensors
        memory = self._arena.take_bytes(window.size, outlines[tensors[0].id].device)
        places = [memory.data_ptr(), *(sources[tensor.id].data_ptr() for tensor in tensors)]
        if window not in self._made or self._made[window][0] != places:
            self._made = {
                w: made for w, made in self._made.items() if made[0][0] == places[0]
            }  # no others keep old memory
            values = window.values_in(memory, outlines, self._arena.alignment(memory.device))
            perturb = self._noise.perturber(list(values.values()), [sources[i] for i in values], tensors=list(values))
            self._made[window] = places, values, perturb
        _, self._values, perturb = self._made[window]
        if len(tensors) == 1:
            (tensor,) = tensors
            self._noise.perturb(self._values[tensor.id], sources[tensor.id], tensor=tensor.id, **point)
        else:
            perturb(point["step"], point["probe"], point["scale"])
        self._now, window.served = window, 0

    def _divide(self, order: Sequence[tuple[int, list[TunedTensor]]], sources: Mapping[int, Tensor]) -> None:
        sizes: dict[int, int] = {}
        for module, owned in order:
            alignment = max((self._arena.alignment(sources[t.id].device) for t in owned), default=1)
            sizes[module] = sum(-(-sources[t.id].nbytes // alignment) * alignment for t in owned)
        limit = max(max(sizes.values()) + _VECTORS, min(sum(sizes.values()) // _SHARE, _MOST))
        window = _Window()
        for module, owned in order:
            if not owned:
                continue
            last = window.modules[-1] if window.modules else []
            kinds = {(sources[t.id].device, sources[t.id].dtype) for t in (*last, *owned)}
            if window.size + sizes[module] > limit or len(kinds) > 1:
                window = _Window()
            window.modules.append(owned)
            window.size += sizes[module]
            self._window_of[module] = window
