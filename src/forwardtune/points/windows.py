"""Weights of consecutive modules, perturbed in one launch: on a GPU, launching small sweeps takes the host longer than they take the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        modules: what they own, by the id of each.
        sizes: bytes of each, with gaps for the alignment.
        served: bytes of those that were called since it was perturbed.
        wasted: how often no more than half of it was served.
    """

    def __init__(self) -> None:
        self.modules: dict[int, list[TunedTensor]] = {}
        self.sizes: dict[int, int] = {}
        self.served = self.wasted = 0

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @functools.cached_property
    def tensors(self) -> list[TunedTensor]:
        """Each once, though modules may share it."""
        return list({tensor.id: tensor for owned in self.modules.values() for tensor in owned}.values())

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
    """The windows of a model. Evaluations show in which order its modules run.

    A window is perturbed when the first of its modules is called, into scratch memory that the one before it had: kernels run in the order of
    their launches. A module that is called inside another one than its neighbours were is left to whoever perturbs single tensors, and so is one
    whose window mostly was perturbed in vain.

    Args:
        noise: says what can share a launch.
        arena: has the memory.
    """

    def __init__(self, noise: Noise, arena: Arena) -> None:
        self._noise, self._arena = noise, arena
        self._order: dict[
            int, list[TunedTensor]
        ] = {}  # by module, in the order of the last evaluation that met a new one
        self._met: dict[int, list[TunedTensor]] = {}  # in this evaluation
        self._window_of: dict[int, _Window] = {}  # by module
        self._given_up: set[int] = set()
        self._now: _Window | None = None
        self._depth, self._base = (
            0,
            arena.mark(),
        )  # at how many running modules it was perturbed, and where its memory begins
        self._values: Mapping[int, Tensor] = {}  # of that one
        # Those of all windows and what perturbs them, for memory at an address: made once, as it mostly stays there.
        self._made: dict[_Window, tuple[int, dict[int, Tensor], Callable[[int, int, float], None]]] = {}
        self._state: list[Any] = []

    def enter(self, sources: Mapping[int, Tensor], tuned: Iterable[TunedTensor]) -> None:
        """Evaluations of these weights begin. If one lies elsewhere, or is of another kind, than it was, all begins anew."""
        state = [
            (w.data_ptr(), w.dtype, w.device, w.shape, w.stride(), t.parameter.requires_grad)
            for t in tuned
            for w in (sources[t.id],)
        ]
        if state != self._state:
            self._order, self._met, self._window_of, self._made, self._given_up = {}, {}, {}, {}, set()
            self._state = state

    def begin(self, sources: Mapping[int, Tensor]) -> None:
        """An evaluation at another point begins. ``sources``: the weights, by id."""
        self.leave()
        if self._met.keys() - self._order.keys():
            self._order = self._met | {
                module: owned for module, owned in self._order.items() if module not in self._met
            }
            self._divide([(m, owned) for m, owned in self._order.items() if owned and m not in self._given_up], sources)
        self._met = {}

    def leave(self) -> None:
        """Let the memory be used by others."""
        if self._now is not None:
            self._arena.release(self._base, poison=False)
        self._now, self._values = None, {}

    def returned(self, running: int) -> None:
        """A module returns, and gives back what was taken since it was called; so many run still."""
        if running < self._depth:
            self._now, self._values, self._depth = None, {}, 0

    def turn_to(
        self, module: nn.Module, running: int, owned: Callable[[], list[TunedTensor]], sources: Mapping[int, Tensor],
        outlines: Mapping[int, Tensor], point: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """A module is called while so many run: have its weights ready, if it is in a window. ``owned``: those that could be."""
        key = id(module)
        if key not in self._met:
            self._met[key] = self._order[key] if key in self._order else owned()
        window = self._window_of.get(key)
        if self._now is None or window is not self._now:
            if self._now is not None and running != self._depth:
                return  # a module that runs may compute with what is there
            self.leave()
            if window is None or self._is_given_up(window):
                return
            self._depth = running
            self._perturb(window, sources, outlines, point)
        window.served += window.sizes[key]

    def value(self, tensor: TunedTensor) -> Tensor | None:
        """The perturbed weight, if it is ready."""
        return self._values.get(tensor.id)

    def _is_given_up(self, window: _Window) -> bool:
        window.wasted += 0 < 2 * window.served <= window.size
        if window.wasted > 8:
            self._given_up |= window.modules.keys()
            self._window_of = {module: other for module, other in self._window_of.items() if other is not window}
            self._made.pop(window, None)
        return window.wasted > 8

    def _perturb(
        self, window: _Window, sources: Mapping[int, Tensor], outlines: Mapping[int, Tensor], point: Mapping[str, Any]
    ) -> None:
        tensors, self._base, window.served = window.tensors, self._arena.mark(), 0
        self._now = window  # from now on its memory is taken, whatever happens
        memory = self._arena.take_bytes(window.size, outlines[tensors[0].id].device)
        if window not in self._made or self._made[window][0] != memory.data_ptr():
            place = memory.data_ptr()
            self._made = {w: made for w, made in self._made.items() if made[0] == place}  # no others keep old memory
            values = window.values_in(memory, outlines, self._arena.alignment(memory.device))
            perturb = self._noise.perturber(list(values.values()), [sources[i] for i in values], tensors=list(values))
            self._made[window] = place, values, perturb
        _, values, perturb = self._made[window]
        if len(tensors) == 1:
            (tensor,) = tensors
            self._noise.perturb(values[tensor.id], sources[tensor.id], tensor=tensor.id, **point)
        else:
            perturb(point["step"], point["probe"], point["scale"])
        self._values = values

    def _divide(self, order: Sequence[tuple[int, list[TunedTensor]]], sources: Mapping[int, Tensor]) -> None:
        self._window_of, self._made = {}, {}
        sizes, kinds = {}, {}
        for module, owned in order:
            alignment = max(self._arena.alignment(sources[t.id].device) for t in owned)
            sizes[module] = sum(-(-sources[t.id].nbytes // alignment) * alignment for t in owned)
            kinds[module] = {(sources[t.id].device, sources[t.id].dtype) for t in owned}
        limit = max(max(sizes.values(), default=0) + _VECTORS, min(sum(sizes.values()) // _SHARE, _MOST))
        window, kind = _Window(), None
        for module, owned in order:
            if len(kinds[module]) > 1:
                continue  # a kernel sweeps over one dtype
            if window.size + sizes[module] > limit or kinds[module] != kind:
                window, kind = _Window(), kinds[module]
            window.modules[module], window.sizes[module] = owned, sizes[module]
            self._window_of[module] = window
