"""A second set of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters
from .perturbation import Perturbation


class Copy(Perturbation):
    """The parameters point to a second set of tensors while the model is evaluated."""

    name = "copy"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        self._shadows: list[Tensor] = []
        self._originals: list[Tensor] = []

    def __enter__(self) -> Copy:
        self._originals = [tensor.read() for tensor in self.tuned]
        if [(s.shape, s.device, s.dtype) for s in self._shadows] != [
            (o.shape, o.device, o.dtype) for o in self._originals
        ]:
            self._shadows = [torch.empty_like(original) for original in self._originals]
        return self

    def shift(self, step: int, query: Query) -> None:
        torch.clear_autocast_cache()  # it holds casts by parameter, and knows nothing of what the parameter points to
        for tensor, original, shadow in zip(self.tuned, self._originals, self._shadows, strict=True):
            if query.scale == 0:
                tensor.parameter.data = original
                continue
            self.noise.perturb(shadow, original, tensor=tensor.id, step=step, probe=query.probe, scale=query.scale)
            tensor.parameter.data = shadow

    def __exit__(self, *exception: object) -> None:
        for tensor, original in zip(self.tuned, self._originals, strict=True):
            tensor.parameter.data = original
        self._originals = []
        torch.clear_autocast_cache()
