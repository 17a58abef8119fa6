"""Rules that need averages of the estimate, element by element: a piece of a tensor at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..names import STATES
from ..noise import Count, Noise, Update
from ..parameters import TunedParameters, TunedTensor
from .base import decay, require_target
from .rule import History, Rule, Step, float32, shares

# "auto" keeps exact moments if they take at most this share of the memory of the model's weights: adapters do.
_SHARE = 0.1
# A window leaves out steps that together have less than this weight in the average.
_CUT_OFF = 0.01
# Elements handled at once: the temporaries stay in the cache of a CPU, and a GPU has enough to do.
_PIECE = {"cpu": 1 << 18}
_PIECE_ELSEWHERE = 1 << 24


class Elementwise(Rule):
    """A rule that needs averages of g element by element.

    A subclass declares :attr:`averages`, :meth:`fold` and :meth:`direction`. Arithmetic is float32 (float64 for float64
    weights) in separate additions, multiplications and divisions, each rounded once, so it gives the same bits on every device. A square
    root is taken in float64: torch's own is not rounded to nearest on a CPU. Nothing is divided by a plain number, which GPUs turn into a
    multiplication.
    """

    averages: ClassVar[int]  # float32 numbers a weight
    state: str
    window: int | None

    @abstractmethod
    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        """Take the estimates of these steps, in order, into the averages.

        Args:
            averages: tensors of shape ``(n,)``, which begin as zeros; changed in place.
            add: ``add(x, updates)`` applies updates to a tensor of that shape, ``x <- decay * x + sum_k sizes[k] z_k``.
        """

    @abstractmethod
    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        """What is subtracted from the weights, shape ``(n,)``. ``count`` steps are in the averages, of which it may make use."""

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Step:
        return Step(
            step=step,
            sizes=shares(coefficients),
            decay=float32(1.0 - lr * weight_decay),
            lr=float32(lr),
        )

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        unchanged: Count = 0
        moments = history.moments.get(tensor.name)
        if moments is None and keep and self.state == "exact":
            with torch.inference_mode(False):  # they outlive the step, whatever mode it is taken in
                moments = history.moments[tensor.name] = _zeros(self.averages, tensor.read())
        for lo, (piece, *parts) in small_pieces(tensor, moments or ()):
            averages = parts or _zeros(self.averages, piece)
            unchanged += self._move_piece(noise, piece, averages, updates, history, tensor, lo)
        return unchanged

    def _move_piece(
        self,
        noise: Noise,
        piece: Tensor,
        averages: Sequence[Tensor],
        updates: Sequence[Update],
        history: History,
        tensor: TunedTensor,
        start: int,
    ) -> Count:
        def add(x: Tensor, steps: list[Update]) -> None:
            noise.update(x, steps, tensor=tensor.id, start=start, shape=tensor.parameter.shape)

        unchanged: Count = 0
        x = torch.empty(piece.numel(), dtype=arithmetic(piece), device=piece.device)
        base: Tensor | None = None
        count, recent = history.taken, deque(history.recent, self.window)
        for update in updates:
            if not update.sizes:
                if update.unused:  # it was taken, for other tensors
                    recent.append(update)
                unchanged += piece.numel()
                continue
            assert isinstance(update, Step)
            if self.state == "exact":
                self.fold(averages, [update], add)
                count += 1
            else:
                recent.append(update)
                for average in averages:
                    average.zero_()
                own = [one for one in recent if one.sizes]
                self.fold(averages, own, add)
                count = len(own)
            base = decay(x.copy_(piece), update, history.base, start, base)
            x.sub_(self.direction(averages, update, count))
            unchanged += noise.store(piece, x, step=update.step, tensor=tensor.id, start=start)
        return unchanged


@dataclass(frozen=True)
class WithMoments(Elementwise):
    """What rules with moments have in common: the form in which they remember.

    Attributes:
        state: ``"exact"``, ``"window"``, or ``"auto"``: exact if the moments take at most a tenth of the memory of the
            model's weights, as for adapters, else window.
        decay_towards: what weight decay pulls towards, ``"zero"`` or ``"base"``.
        window: W, the number of steps in a window. By default as many as leave out less than 1% of the average.

    Raises:
        ValueError: an argument out of range.
    """

    state: str = field(default="auto", kw_only=True)
    window: int | None = field(default=None, kw_only=True)
    decay_towards: str = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        require_target(self.decay_towards)
        if self.state not in STATES:
            raise InputError(
                f"unknown state {self.state!r}{nearest(str(self.state), STATES)}: choose one of {', '.join(STATES)}"
            )
        if self.window is None:
            return
        if self.state == "exact":
            raise InputError("state='exact' remembers every step: leave window out, or set state='window'")
        if not (isinstance(self.window, int) and self.window >= 1):
            raise InputError(f"window must be an integer of at least 1, got {self.window!r}")

    @property
    def remembers(self) -> bool:
        return True

    @property
    @abstractmethod
    def slowest(self) -> float:
        """The factor by which the slowest average forgets a step, below 1."""

    @property
    def is_resolved(self) -> bool:
        return self.state == "exact" or (self.state == "window" and self.window is not None)

    def resolved(self, tuned: TunedParameters) -> Rule:
        state = self.state
        if state == "auto":
            everything = tuned.module.parameters() if tuned.module is not None else [t.parameter for t in tuned]
            model = sum(parameter.numel() * parameter.element_size() for parameter in everything)
            exact = self.window is None and 4 * self.averages * tuned.numel <= _SHARE * model
            state = "exact" if exact else "window"
        if state == "exact" or self.window is not None:
            return replace(self, state=state)
        return replace(self, state=state, window=window_of(self.slowest))

    def settings(self) -> dict[str, Any]:
        own = [setting.name for setting in fields(self) if setting.name not in ("state", "window")]
        settings = {key: getattr(self, key) for key in (*own, "state", "window")}
        unsaid = {"decay_towards": "zero"} | self.unsaid
        return {key: value for key, value in settings.items() if value is not None and unsaid.get(key) != value}


def _zeros(count: int, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(like.numel(), dtype=arithmetic(like), device=like.device) for _ in range(count))


def small_pieces(tensor: TunedTensor, beside: Sequence[Tensor] = ()) -> Iterator[tuple[int, list[Tensor]]]:
    """The pieces of a tensor (:meth:`TunedTensor.pieces`), cut to as many elements as are handled at once."""
    for lo, flats in tensor.pieces(beside):
        size = _PIECE.get(flats[0].device.type, _PIECE_ELSEWHERE)
        for at in range(0, flats[0].numel(), size):
            yield lo + at, [flat[at : at + size] for flat in flats]


def arithmetic(weight: Tensor) -> torch.dtype:
    """In which numbers weights are computed with."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def window_of(factor: float) -> int:
    """The least W with ``factor^W < 1%``."""
    weight, window = factor, 1
    while weight >= _CUT_OFF:
        weight, window = weight * factor, window + 1
    return window
