"""L1: the directions of the present point of an evaluation, drawn once for all tensors and for both sides of a probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor


class PointDirections:
    """What a side path multiplies with.

    Args:
        left_out: ids of the tensors that are not asked for; it may grow.

    Attributes:
        step, query: the present point.
        copies: 2 while the rows of both sides of the probe are worked on together: there are as many directions again, turned round.
    """

    def __init__(self, tuned: TunedParameters, noise: Noise, left_out: set[int]) -> None:
        self._tuned, self._noise, self._left_out = tuned, noise, left_out
        self.step, self.query = 0, Query(0, 0.0)
        self.copies = 1
        self._vectors: dict[tuple[Any, ...], dict[int, Tensor]] = {}  # full directions of vectors, at scale 1
        self._factors: dict[tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]] = {}

    def go_to(self, step: int, query: Query) -> None:
        """Be the directions of this point from now on."""
        if (step, query.probe, query.stride) != (self.step, self.query.probe, self.query.stride):
            self.forget()
        self.step, self.query = step, query

    def forget(self) -> None:
        """Keep nothing that was drawn."""
        self._factors.clear()
        self._vectors.clear()

    def _address(self, tensor: TunedTensor) -> dict[str, Any]:
        return {"tensor": tensor.id, "step": self.step, "scale": self.query.scale}

    def is_low_rank(self, tensor: TunedTensor) -> bool:
        """Whether a tensor's directions have factors."""
        return self._noise.is_low_rank(tensor.parameter.shape)

    @property
    def scale(self) -> float:
        """The scale of the present point."""
        return self.query.scale

    def factors(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U / sqrt(r), shape (count, r, m), and V, (count, r, n), of so many directions. Both sides of a probe have the same ones."""
        key = (count, tensor.device, dtype)
        if key not in self._factors:
            self._factors[key] = self._drawn(count, tensor.device, dtype)
        return self._factors[key][tensor.id]

    def _drawn(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """The factors of all tensors on a device: one call for all costs a tenth of one for each."""
        here = [t for t in self._tuned if t.device == device and self.is_low_rank(t) and t.id not in self._left_out]
        found = self._noise.factors_of(
            [(t.id, t.parameter.shape) for t in here],
            step=self.step,
            probes=self.query.directions(count),
            device=device,
            dtype=dtype,
        )
        return {t.id: (u.mT.contiguous(), v.mT.contiguous()) for t, (u, v) in zip(here, found, strict=True)}

    def directions(self, tensor: TunedTensor, count: int) -> Tensor:
        """Scaled directions of a tensor of full ones, shape (count, *shape)."""
        parameter, probes = tensor.parameter, self.query.directions(count)
        if parameter.ndim > 1:  # an adapter's, of every example: not kept
            address = self._address(tensor)
            return self._noise.directions(parameter.shape, probes=probes, device=tensor.device, **address)
        return self.vectors(tensor, count, torch.float32) * self.scale

    def vectors(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> Tensor:
        """Directions of a vector, not scaled, shape (count, n)."""
        device = tensor.device
        key = (count, device, dtype)
        if key not in self._vectors:
            here = [t for t in self._tuned if t.device == device and t.parameter.ndim == 1]
            found = self._noise.directions_of(
                [(t.id, t.parameter.shape) for t in here],
                step=self.step,
                probes=self.query.directions(count),
                device=device,
                dtype=dtype,
            )
            self._vectors[key] = {t.id: z for t, z in zip(here, found, strict=True)}
        return self._vectors[key][tensor.id]

    def rows(self, tensor: TunedTensor, numbers: Tensor, owner: Tensor, count: int) -> Tensor:
        """Rows of the scaled directions: those of the numbers, each along the direction of its owner, one of so many; shape
        (*numbers.shape, n)."""
        owner = owner.expand(numbers.shape).reshape(-1)
        flat = numbers.reshape(-1)
        many = count // self.copies
        sign, owner = 1 - 2 * (owner // many), owner % many
        probes = self.query.probe + owner * self.query.stride
        shape = tensor.parameter.shape
        if not self.is_low_rank(tensor):
            found = self._noise.direction_rows(shape, flat, probes, **self._address(tensor))
        else:
            u = self._noise.factor_rows(shape, flat, probes, **self._address(tensor))
            _, v = self.factors(tensor, many, tensor.parameter.dtype)  # those that projections take, too
            found = torch.einsum("pr,prn->pn", u, v[owner].to(u.dtype))
        if self.copies > 1:
            found = found * sign[:, None]
        return found.view(*numbers.shape, shape[-1])
