"""Momentum inside the thin factor of low-rank directions, made orthogonal before it moves the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import Count, Noise, Update
from ..parameters import TunedTensor
from .estimators import Estimator
from .moments import arithmetic, window_of
from .rule import History, Rule, Step, float32, shares

# Muon's polynomial and number of rounds: singular values from 0.002 to 1 end between 0.68 and 1.14.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
# Numbers are squared and added as integers of so many bits, so that no order of the sum matters: 2 * 20 + 22 bits for 2^22 rows.
_BITS = 20
# Rows of a tensor that are moved at once hold about so many elements.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Muon(Rule):
    """For a matrix with directions ``Z_t = U_t V^T / sqrt(r)``, V the same for nu steps:

    ``S <- mu S + c_t U_t`` since V was drawn, shape (m, r); ``O = S p(S^T S)``, near to the orthogonal factor ``S (S^T S)^{-1/2}``;
    ``theta <- (1 - lr * weight_decay) * theta - lr sqrt(m / r) O V^T``.

    So each of the r directions that V spans is taken at the same length, and a weight moves by about lr, root mean square, whatever the size of
    the loss. Tensors with full directions, which are small, move by ``lr m / rms(m)`` with ``m <- mu m + c_t z_t``.

    S is rebuilt from the coefficients of the last W steps at every update, and takes no memory: it is as thin as U. p are five rounds of
    Newton-Schulz with Muon's polynomial, in float64 on ``S^T S`` (r, r), element by element in a fixed order; the sums over rows that
    ``S^T S`` consists of are of integers. So the bits are the same on every machine.

    Attributes:
        momentum: mu, from 0 up to 1, 1 excluded.
        window: W; by default as many steps as leave out less than 1%.

    Source: ZO-Muon (2026): directions in a subspace, their estimate made orthogonal. There a step has several probes in the subspace; here
    it has one, and steps that share V take their place. Newton-Schulz: Jordan et al., "Muon", 2024.
    """

    momentum: float = 0.9
    window: int | None = None
    name: ClassVar[str] = "muon"

    def __post_init__(self) -> None:
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise InputError(f"momentum must be a number from 0 up to 1, 1 excluded, got {self.momentum!r}")
        if self.window is None:
            object.__setattr__(self, "window", window_of(self.momentum))
        elif not (isinstance(self.window, int) and self.window >= 1):
            raise InputError(f"window must be an integer of at least 1, got {self.window!r}")

    @property
    def remembers(self) -> bool:
        return True

    def settings(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "window": self.window}

    def require(self, estimator: Estimator, noise: Noise) -> None:
        if noise.structure is None or estimator.per_example or estimator.probes > 1 or noise.emphasis is not None:
            raise InputError(
                "the rule 'muon' works in the space that V of low-rank directions spans, one direction a step: set rank, and refresh to 10 or "
                "more, and leave probes, assignment, active_layers, sparsity and modify out"
            )

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Step:
        return Step(step, shares(coefficients), float32(1.0 - lr * weight_decay), lr=float32(lr))

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        unchanged: Count = 0
        recent: deque[Update] = deque(history.recent, self.window)
        for update in updates:
            if not update.sizes:
                unchanged += tensor.parameter.numel()
                continue
            assert isinstance(update, Step)
            recent.append(update)
            move = self._move_matrix if noise.is_low_rank(tensor.parameter.shape) else self._move_whole
            unchanged += move(noise, tensor, update, [u for u in recent if u.sizes])
        return unchanged

    def _move_matrix(self, noise: Noise, tensor: TunedTensor, update: Step, recent: Sequence[Update]) -> Count:
        structure, shape, mu = noise.structure, tensor.parameter.shape, float32(self.momentum)
        assert structure is not None
        drawn_at = structure.step_of_v(update.step)
        momentum = v = None
        for step in (u for u in recent if structure.step_of_v(u.step) == drawn_at):
            u, v = noise.factors(
                shape, tensor=tensor.id, step=step.step, probes=[0], scale=step.sizes[0], device=tensor.device
            )
            momentum = u[0] if momentum is None else momentum.mul_(mu).add_(u[0])
        assert momentum is not None
        assert v is not None
        o = orthogonal(momentum).mul_(float32(update.lr * math.sqrt(momentum.shape[0] / structure.rank)))
        kind, width = arithmetic(tensor.parameter), shape[-1]
        o, v = o.to(kind), v[0].to(kind)
        unchanged: Count = 0
        size = max(1, _PIECE // width) * width
        for at, (flat,) in tensor.pieces(unit=width):
            for lo in range(at, at + flat.numel(), size):
                piece = flat[lo - at : lo - at + size]
                x = piece.to(kind).view(-1, width)
                if update.decay != 1.0:
                    x = x * update.decay
                for left, right in zip(o[lo // width :][: len(x)].T, v.T, strict=True):
                    x = x - left[:, None] * right
                unchanged += noise.store(piece, x.view(-1), tensor=tensor.id, step=update.step, start=lo)
        return unchanged

    def _move_whole(self, noise: Noise, tensor: TunedTensor, update: Step, recent: Sequence[Update]) -> Count:
        kind, shape, numel = arithmetic(tensor.parameter), tensor.parameter.shape, tensor.parameter.numel()
        momentum = torch.zeros(numel, dtype=kind, device=tensor.device)
        steps = [Update(u.step, u.sizes, float32(self.momentum)) for u in recent]
        noise.update(momentum, steps, tensor=tensor.id, shape=shape)
        squares = _gram(momentum.float()[:, None])[0, 0]
        momentum.mul_(float32(update.lr * math.sqrt(numel / squares)) if squares > 0 else 0.0)
        unchanged: Count = 0
        for lo, (piece,) in tensor.pieces():
            x = piece.to(kind)
            if update.decay != 1.0:
                x = x * update.decay
            x = x - momentum[lo : lo + piece.numel()]
            unchanged += noise.store(piece, x, tensor=tensor.id, step=update.step, start=lo)
        return unchanged


def orthogonal(s: Tensor) -> Tensor:
    """``s p(s^T s)`` with singular values near 1, float32, the same bits on every machine; 0 where s is.

    Args:
        s: float32, shape (m, r) with r small.
    """
    gram = _gram(s)
    size = math.sqrt(sum(float(gram[i, j]) ** 2 for i in range(len(gram)) for j in range(len(gram)))) or 1.0
    gram = gram * (1 / size)
    a, b, c = _COEFFICIENTS
    eye = torch.eye(len(gram), dtype=torch.float64)
    whole = eye * (1 / math.sqrt(size))
    for _ in range(_ROUNDS):
        p = eye * a + gram * b + _product(gram, gram) * c
        whole = _product(whole, p)
        gram = _product(_product(p, gram), p)
    right = whole.to(torch.float32).to(s.device)
    out = torch.zeros_like(s)
    for column, row in zip(s.T, right, strict=True):
        out = out + column[:, None] * row
    return out


def _gram(s: Tensor) -> Tensor:
    """``s^T s`` in float64 on the CPU, of s rounded to 20 bits below its largest element."""
    s = s.detach().cpu()
    largest = float(s.abs().max()) if s.numel() else 0.0
    if not 0 < largest < math.inf:
        return torch.zeros(s.shape[1], s.shape[1], dtype=torch.float64)
    exponent = math.frexp(largest)[1]
    whole = (s.double() * 2.0 ** (_BITS - exponent)).round().to(torch.int64)
    return (whole.T @ whole).double() * 2.0 ** (2 * (exponent - _BITS))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A product of small matrices, summed in order."""
    out = torch.zeros_like(a)
    for k in range(len(a)):
        out = out + a[:, k : k + 1] * b[k]
    return out
