"""Directions that are not alike everywhere: absent from some layers or weights, longer in some tensors than in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .definition import ROUNDING_PROBE, Update
from .philox import half_words

#: The probe number whose half-words choose the layers of a step; no direction uses it.
LAYERS_PROBE = ROUNDING_PROBE - 1
# Elements handled at once: a copy of so many is kept while they are swept over.
_PIECE = 1 << 18
_PIECE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Emphasis:
    """By the id of a tensor, how its directions differ from the noise; what is empty makes no difference.

    Attributes:
        layers: number of the layer that a tensor belongs to, from 0; -1: to none, and it takes part in every step.
        active: so many layers take part in a step, drawn anew for each by the seed; the others have no direction then.
        probed: a perturbation is so many times as long.
        moved: what a step adds along a direction is so many times as long.
        limits: weights of a larger magnitude have no direction, and a step leaves them as they are, without weight decay; None: all
            have one. Which these are is seen from the stored weights of the moment, so nothing the size of the weights is kept.
    """

    layers: tuple[int, ...] = ()
    active: int = 0
    probed: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    limits: tuple[float | None, ...] = ()

    def content(self) -> dict[str, Any]:
        """What the step log's header keeps of it, as JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items() if value}

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> Emphasis:
        """The inverse of :meth:`content`."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return cls(**values)

    def takes_part(self, seed: int, tensor: int, step: int) -> bool:
        """Whether a tensor has a direction in a step."""
        if not self.active or self.layers[tensor] < 0:
            return True
        return self.layers[tensor] in chosen_layers(seed, step, max(self.layers) + 1, self.active)

    def scale(self, seed: int, tensor: int, step: int, scale: float) -> float:
        """What the noise is multiplied with for a perturbation of this scale."""
        if not self.takes_part(seed, tensor, step):
            return 0.0
        return scale * self.probed[tensor] if self.probed else scale

    def updates(self, seed: int, tensor: int, updates: Sequence[Update]) -> list[Update]:
        """The same steps in multiples of the noise; a size is 0 where the tensor had no direction."""
        factor = self.moved[tensor] if self.moved else 1.0
        factors = [factor if self.takes_part(seed, tensor, update.step) else 0.0 for update in updates]
        return [
            replace(update, sizes=tuple(f * size for size in update.sizes))
            for f, update in zip(factors, updates, strict=True)
        ]

    def limit(self, tensor: int) -> float | None:
        """The largest magnitude of a weight that has a direction; None: any."""
        return self.limits[tensor] if self.limits else None


@lru_cache(maxsize=16)
def chosen_layers(seed: int, step: int, count: int, active: int) -> frozenset[int]:
    """The layers of a step: those with the smallest of ``count`` random 32-bit numbers, the first ones where numbers are equal."""
    halves = half_words(seed, 0, step, LAYERS_PROBE, 0, 2 * count)
    numbers = (halves[0::2] + (halves[1::2] << 16)).tolist()
    return frozenset(sorted(range(count), key=numbers.__getitem__)[:active])


def pieces(flat: Tensor) -> list[tuple[int, Tensor]]:
    """A flat tensor in pieces, each with the place of its first element."""
    size = _PIECE if flat.device.type == "cpu" else _PIECE_ELSEWHERE
    return [(lo, flat[lo : lo + size]) for lo in range(0, flat.numel(), size)]


def give_back(swept: Tensor, kept: Tensor, limit: float) -> None:
    """Give elements that were above the limit the values back that they had before a sweep."""
    swept.copy_(torch.where(kept.abs() > limit, kept, swept))
