"""L1: steps that are not in the weights yet, as a side path adds them to what layers give: to every row alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..method.pending import Pending
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor


class Waiting:
    """P and V of ``sum_k P_k V_k^T``, by which weights lag behind. P grows with every step, V stays as long as it is that of the directions.

    Attributes:
        pending: the steps; None where every step moves the weights.
    """

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        self._tuned, self._noise = tuned, noise
        self.pending: Pending | None = None
        self._steps: list[Any] = []  # of which the sums are
        self._columns = 0
        self._sums: dict[int, Tensor] = {}
        self._p: dict[tuple[torch.device, torch.dtype, float], dict[int, Tensor]] = {}
        self._drawn_at, self._drawn = -1, 0
        self._v: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}

    @property
    def count(self) -> int:
        """The number of products, k."""
        return max((len(updates[0].sizes) for updates in self.pending.steps), default=0) if self.pending else 0

    def lags(self, tensor: TunedTensor) -> bool:
        """Whether a tensor is not where the steps have led."""
        return bool(self.pending and self.pending.steps) and self._noise.waits(tensor.parameter.shape)

    def of(self, tensor: TunedTensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """P / scale, shape (k r, m), and V, (k r, n), of a matrix; None: it does not lag behind."""
        if not self.lags(tensor):
            return None
        assert self.pending is not None
        self._add_up()
        key = (tensor.device, dtype, scale)
        if key not in self._p:
            exact = torch.promote_types(dtype, torch.float32)
            found = {t.id: self._sums[t.id].mT.to(exact) / scale for t in self._here(tensor.device)}
            self._p[key] = {i: p.to(dtype).flatten(0, 1).contiguous() for i, p in found.items()}
        return self._p[key][tensor.id], self.v(tensor, self.pending.taken - 1, self.count, dtype)

    def v(self, tensor: TunedTensor, step: int, count: int, dtype: torch.dtype) -> Tensor:
        """V of the first so many directions of a matrix, shape (count r, n): drawn once for all steps that have it, and for all matrices."""
        assert self._noise.structure is not None
        device = tensor.device
        drawn_at, rank = self._noise.structure.step_of_v(step), self._noise.structure.rank
        if drawn_at != self._drawn_at or count > self._drawn:
            self._v, self._drawn_at, self._drawn = {}, drawn_at, count
        if (device, dtype) not in self._v:
            here = self._here(device)
            places = [(t.id, t.parameter.shape) for t in here]
            drawn = self._noise.v_of(places, step=step, probes=range(self._drawn), device=device, dtype=dtype)
            self._v[device, dtype] = {t.id: v for t, v in zip(here, drawn, strict=True)}
        return self._v[device, dtype][tensor.id][: count * rank]

    def whole(self, tensor: TunedTensor, values: Tensor) -> Tensor:
        """The values of a tensor with what waits for it, in memory of its own; themselves if nothing does."""
        arithmetic = torch.promote_types(values.dtype, torch.float32)
        if (found := self.of(tensor, arithmetic)) is None:
            return values
        p, v = found
        return torch.addmm(values.to(arithmetic), p.mT, v).to(values.dtype)

    def _here(self, device: torch.device) -> list[TunedTensor]:
        return [t for t in self._tuned if t.device == device and self._noise.waits(t.parameter.shape)]

    def _add_up(self) -> None:
        """Let the sums be those of the steps, in their order, whenever they are asked for."""
        assert self.pending is not None
        steps, count = list(self.pending.steps), self.count
        if steps == self._steps:
            return
        known = len(self._steps)
        if steps[:known] != self._steps or count != self._columns:
            self._sums, known = {}, 0
        places: dict[tuple[torch.device, int], list[TunedTensor]] = {}
        for tensor in self._tuned:
            if self._noise.waits(tensor.parameter.shape):
                places.setdefault((tensor.device, tensor.group), []).append(tensor)
        for updates in steps[known:]:
            for (device, group), tensors in places.items():
                rows = [(t.id, 0, t.parameter.shape[0]) for t in tensors]
                for t, u in zip(tensors, self._noise.sums_of_u(rows, [updates[group]], count, device), strict=True):
                    self._sums[t.id] = self._sums[t.id].add_(u) if t.id in self._sums else u
        self._steps, self._columns, self._p = steps, count, {}
