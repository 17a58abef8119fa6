"""The published loop's way."""

from __future__ import annotations

import torch

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters
from .perturbation import Perturbation


class InPlace(Perturbation):
    """The published loop: the weights themselves move, and come back only up to rounding."""

    name = "in_place"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        self._at: tuple[int, int, float] | None = None

    def __enter__(self) -> InPlace:
        return self

    def shift(self, step: int, query: Query) -> None:
        probe, scale = query.probe, query.scale
        if scale == 0:
            self._return()
            return
        if self._at is not None and self._at[:2] == (step, probe):
            self._add(step, probe, scale - self._at[2])
        else:
            self._return()
            self._add(step, probe, scale)
        self._at = (step, probe, scale)

    def __exit__(self, *exception: object) -> None:
        self._return()

    def _return(self) -> None:
        if self._at is not None:
            step, probe, scale = self._at
            self._at = None
            self._add(step, probe, -scale)

    def _add(self, step: int, probe: int, scale: float) -> None:
        torch.clear_autocast_cache()
        for tensor in self.tuned:
            weight = tensor.parameter.detach()
            self.noise.perturb(weight, weight, tensor=tensor.id, step=step, probe=probe, scale=scale)
