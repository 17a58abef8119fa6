"""L1: the directions of the present point of an evaluation, drawn once for all tensors and for both sides of a probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor
from .waiting import Waiting


class PointDirections:
    """What a side path multiplies with.

    Args:
        left_out: ids of the tensors that are not asked for; it may grow.

    Attributes:
        step, query: the present point.
        waiting: steps that are not in the weights yet.
        copies: 2 while the rows of both sides of the probe are worked on together: there are as many directions again, turned round.
    """

    def __init__(self, tuned: TunedParameters, noise: Noise, left_out: set[int]) -> None:
        self._tuned, self._noise, self._left_out = tuned, noise, left_out
        self.step, self.query = 0, Query(0, 0.0)
        self.copies = 1
        self.waiting = Waiting(tuned, noise)
        self._vectors: dict[tuple[Any, ...], dict[int, Tensor]] = {}  # full directions of vectors, at scale 1
        self._factors: dict[tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]] = {}
        self._wide: dict[tuple[Any, ...], tuple[Tensor, Tensor, int]] = {}

    def go_to(self, step: int, query: Query) -> None:
        """Be the directions of this point from now on."""
        if (step, query.probe, query.stride) != (self.step, self.query.probe, self.query.stride):
            self.forget()
        self.step, self.query = step, query

    def forget(self) -> None:
        """Keep nothing that was drawn."""
        self._factors.clear()
        self._wide.clear()
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
        places, probes = [(t.id, t.parameter.shape) for t in here], self.query.directions(count)
        settings: dict[str, Any] = {"step": self.step, "probes": probes, "device": device, "dtype": dtype}
        if self.waiting.pending is None:
            found = self._noise.factors_of(places, **settings)
            return {t.id: (u.mT.contiguous(), v.mT.contiguous()) for t, (u, v) in zip(here, found, strict=True)}
        stacks = [place for place in places if not self._noise.waits(place[1])]
        v_of = {place[0]: v.mT for place, v in zip(stacks, self._noise.v_of(stacks, **settings), strict=True)}
        for t in here:
            if self._noise.waits(t.parameter.shape):
                v = self.waiting.v(t, self.step, max(probes) + 1, dtype).unflatten(0, (max(probes) + 1, -1))
                v_of[t.id] = v[probes.start :: probes.step]
        u_of = self._noise.u_of(places, **settings)
        return {t.id: (u.mT.contiguous(), v_of[t.id].contiguous()) for t, u in zip(here, u_of, strict=True)}

    def with_waiting(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        """:meth:`factors`, and behind them those of what waits for a matrix, divided by the scale: all of them ``(columns, m)`` and
        ``(columns, n)``, and how many columns wait."""
        key = (tensor.id, count, dtype, self.scale)
        if key not in self._wide:
            factors, found = self.factors(tensor, count, dtype), self.waiting.of(tensor, dtype, self.scale)
            u, v = (factor.flatten(0, 1) for factor in factors)
            columns = 0
            if found is not None:
                u, v, columns = torch.cat([u, found[0]]), torch.cat([v, found[1]]), len(found[0])
            self._wide[key] = u, v, columns
        return self._wide[key]

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

    def waiting_rows(self, tensor: TunedTensor, numbers: Tensor) -> Tensor | None:
        """What waits for these rows of a table, shape ``(*numbers.shape, n)``; None if nothing does."""
        exact = torch.promote_types(tensor.parameter.dtype, torch.float32)
        if (found := self.waiting.of(tensor, exact)) is None:
            return None
        p, v = found
        return (p[:, numbers.reshape(-1)].mT @ v).view(*numbers.shape, v.shape[1])
