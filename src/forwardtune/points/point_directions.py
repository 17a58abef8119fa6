"""L1: the directions of the present point of an evaluation, drawn once for all tensors and for both sides of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor
from ..storage import RESIDENT
from .waiting import Waiting

# So many inputs' places are kept in mind.
_MOST_SIDES = 16


class PointDirections:
    """What a side path multiplies with.

    Args:
        left_out: ids of the tensors that are not asked for; it may grow.

    Attributes:
        step, query: the present point.
        waiting: steps that are not in the weights yet.
        copies: 2 while the rows of both sides of the probe are worked on together: there are as many directions again, turned round.
        probes: so many, from the query's on, are worked on together: directions come probe by probe, each of all examples.
    """

    def __init__(self, tuned: TunedParameters, noise: Noise, left_out: set[int]) -> None:
        self._tuned, self._noise, self._left_out = tuned, noise, left_out
        self.step, self.query = 0, Query(0, 0.0)
        self.copies = self.probes = 1
        self.waiting = Waiting(tuned, noise)
        self._are_low: dict[int, bool] = {}
        self._factors: dict[tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]] = {}
        self._wide: dict[tuple[Any, ...], tuple[Tensor, Tensor, int]] = {}
        self._vectors: dict[tuple[Any, ...], dict[int, Tensor]] = {}  # full directions of vectors, at scale 1
        self._moved: dict[tuple[Any, ...], dict[int, Tensor]] = {}
        self._asked: dict[
            Any, dict[int, TunedTensor]
        ] = {}  # vectors that were asked for, at any point: the next time, together
        self._sides: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def go_to(self, step: int, query: Query) -> None:
        """Be the directions of this point from now on."""
        if (step, query.probe, query.stride) != (self.step, self.query.probe, self.query.stride):
            self.forget()
        self.step, self.query = step, query
        self._moved.clear()

    def numbers(self, count: int) -> Sequence[int]:
        """Those of so many directions."""
        if self.probes == 1:
            return self.query.directions(count)
        each = [
            self.query._replace(probe=self.query.probe + k).directions(count // self.probes) for k in range(self.probes)
        ]
        return [number for numbers in each for number in numbers]

    def forget(self) -> None:
        """Keep nothing that was drawn."""
        self._factors.clear()
        self._wide.clear()
        self._vectors.clear()
        self._moved.clear()

    def _address(self, tensor: TunedTensor) -> dict[str, Any]:
        return {"tensor": tensor.id, "step": self.step, "scale": self.query.scale}

    def is_low_rank(self, tensor: TunedTensor) -> bool:
        """Whether a tensor's directions have factors."""
        if tensor.id not in self._are_low:
            self._are_low[tensor.id] = self._noise.is_low_rank(tensor.parameter.shape)
        return self._are_low[tensor.id]

    @property
    def scale(self) -> float:
        """The scale of the present point."""
        return self.query.scale

    @property
    def rank(self) -> int:
        """That of the directions that have factors."""
        assert self._noise.structure is not None
        return self._noise.structure.rank

    def factors(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U / sqrt(r), shape (count, r, m), and V, (count, r, n), of so many directions. Both sides of a probe have the same ones."""
        u, v = self._flat_factors(tensor, count, dtype)
        return u.view(count, -1, u.shape[1]), v.view(count, -1, v.shape[1])

    def _flat_factors(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        drawn = self._factors.setdefault((count, self.probes, dtype), {})
        if tensor.id not in drawn:
            drawn.update(self._drawn(count, tensor, dtype))
        return drawn[tensor.id]

    def _drawn(self, count: int, tensor: TunedTensor, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """The factors of all tensors on the device of one: a call for all costs a tenth of one for each."""
        device = tensor.device
        here = [t for t in self._tuned if t.device == device and self.is_low_rank(t)]
        here = [t for t in here if t is tensor or t.id not in self._left_out]
        places, probes = [(t.id, t.parameter.shape) for t in here], self.numbers(count)
        settings: dict[str, Any] = {"step": self.step, "probes": probes, "device": device, "dtype": dtype}
        if self.waiting.pending is None:
            found = self._noise.factors_of(places, **settings)
            return {t.id: factors for t, factors in zip(here, found, strict=True)}
        stacks = [place for place in places if not self._noise.waits(place[1])]
        v_of = {place[0]: v for place, v in zip(stacks, self._noise.v_of(stacks, **settings), strict=True)}
        for t in here:
            if self._noise.waits(t.parameter.shape):
                v = self.waiting.v(t, self.step, max(probes) + 1, dtype)
                own = list(probes)
                whole = own == list(range(len(v) // self.rank))
                v_of[t.id] = v if whole else v.unflatten(0, (-1, self.rank))[own].flatten(0, 1)
        u_of = self._noise.u_of(places, **settings)
        return {t.id: (u, v_of[t.id]) for t, u in zip(here, u_of, strict=True)}

    def with_waiting(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        """:meth:`factors`, and behind them those of what waits for a matrix, divided by the scale: all of them ``(columns, m)`` and
        ``(columns, n)``, and how many columns wait."""
        u, v = self._flat_factors(tensor, count, dtype)
        if not self.waiting.lags(tensor):
            return u, v, 0
        key = (tensor.id, count, self.probes, dtype, self.scale)
        if key not in self._wide:
            found = self.waiting.of(tensor, dtype, self.scale)
            assert found is not None
            self._wide[key] = torch.cat([u, found[0]]), torch.cat([v, found[1]]), len(found[0])
        return self._wide[key]

    def directions(self, tensor: TunedTensor, count: int) -> Tensor:
        """Scaled directions of a matrix of full ones, as an adapter's, shape (count, *shape): not kept."""
        probes = self.numbers(count)
        return self._noise.directions(
            tensor.parameter.shape, probes=probes, device=tensor.device, **self._address(tensor)
        )

    def vectors(self, tensor: TunedTensor, count: int, dtype: torch.dtype) -> Tensor:
        """Directions of a vector, not scaled, on all sides that are worked on, shape (count, n)."""
        drawn = self._vectors.setdefault((count, self.copies, self.probes, dtype), {})
        if tensor.id not in drawn:
            device = tensor.device
            here = [t for t in self._together(dtype, tensor) if t.device == device and t.id not in drawn]
            found = self._noise.directions_of(
                [(t.id, t.parameter.shape[0]) for t in here],
                step=self.step,
                probes=self.numbers(count // self.copies),
                device=device,
                dtype=dtype,
                mirrored=self.copies > 1,
            )
            drawn.update((t.id, z) for t, z in zip(here, found, strict=True))
        return drawn[tensor.id]

    def _together(self, kind: Any, tensor: TunedTensor) -> list[TunedTensor]:
        """Those that were asked for in the same way, at whatever point."""
        asked = self._asked.setdefault(kind, {})
        asked[tensor.id] = tensor
        return [t for t in asked.values() if t is tensor or t.id not in self._left_out]

    def moved(self, tensor: TunedTensor, values: Tensor, count: int) -> Tensor:
        """The values of a vector moved along so many directions, on all sides that are worked on, shape (count, n)."""
        known = self._moved.setdefault((count, self.copies, self.probes), {})
        if tensor.id not in known:
            shape, dtype, device = values.shape, values.dtype, values.device
            here = [tensor]
            if tensor.home is RESIDENT:
                likely = self._together((shape, dtype, device, "moved"), tensor)
                here = [t for t in likely if t.id not in known and _is_like(t.parameter, values)]
            own = [values if t is tensor else t.read() for t in here]
            shift = torch.stack([self.vectors(t, count, torch.float32) for t in here]).mul_(self.scale)
            exact = torch.promote_types(dtype, torch.float32)
            there = (torch.stack(own).to(exact)[:, None] + shift).to(dtype)
            if tensor.home is not RESIDENT:
                return there[0]  # values are here for a while
            known.update((t.id, each) for t, each in zip(here, there.unbind(), strict=True))
        return known[tensor.id]

    def rows(self, tensor: TunedTensor, numbers: Tensor, owner: Tensor, count: int) -> Tensor:
        """Rows of the scaled directions: those of the numbers, each along the direction of its owner, one of so many; shape
        (*numbers.shape, n)."""
        flat = numbers.reshape(-1)
        many = count // self.copies
        sign, owner = self._sides_of(owner, numbers.shape, many)
        probes = self.query.probe + owner * self.query.stride
        if self.probes > 1:
            of_each = many // self.probes
            probes = self.query.probe + owner // of_each + owner % of_each * self.query.stride
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

    def _sides_of(self, owner: Tensor, shape: torch.Size, many: int) -> tuple[Tensor, Tensor]:
        """1, or -1 on the other side of a probe, and the direction's number, of so many, for all of these places."""
        key = (owner, shape, many)  # the owners of one input are one tensor, at whatever point
        if key not in self._sides:
            whose = owner.expand(shape).reshape(-1)
            if len(self._sides) >= _MOST_SIDES:
                self._sides.clear()
            self._sides[key] = 1 - 2 * (whose // many), whose % many
        return self._sides[key]

    def waiting_rows(self, tensor: TunedTensor, numbers: Tensor) -> Tensor | None:
        """What waits for these rows of a table, shape ``(*numbers.shape, n)``; None if nothing does."""
        exact = torch.promote_types(tensor.parameter.dtype, torch.float32)
        if (found := self.waiting.of(tensor, exact)) is None:
            return None
        p, v = found
        return (p[:, numbers.reshape(-1)].mT @ v).view(*numbers.shape, v.shape[1])


def _is_like(parameter: Tensor, values: Tensor) -> bool:
    return parameter.shape == values.shape and parameter.dtype == values.dtype and parameter.device == values.device
