"""L2: how coefficients move the weights.

A rule turns one step's coefficients into an :class:`~forwardtune.noise.Update`, a few float32 numbers, and moves one tensor
at a time by one or many of them. Training, resuming and replay call the same function, so they cannot disagree.

============  ==================================================  ==================================================
name          update, with the estimate ``g = mean_k c_k z_k``    memory
============  ==================================================  ==================================================
``sgd``       ``theta <- theta - lr g``                           none
``sign``      ``theta <- theta - lr sign(g)``                     none
``momentum``  ``m <- mu m + g``; ``theta <- theta - lr m``        m, or the coefficients of the last W steps
``adam``      AdamW                                               m and v, or the coefficients of the last W steps
``muon``      ``m`` of low-rank directions, made orthogonal       the coefficients of the last W steps (:mod:`.muon`)
============  ==================================================  ==================================================

All of them decay weights first, ``theta <- (1 - lr * weight_decay) * theta``, or with ``decay_towards="base"`` what moved,
``theta <- theta_0 + (1 - lr * weight_decay) * (theta - theta_0)``: three float32 operations, each rounded once, on theta_0 as the run began.

What ``momentum`` and ``adam`` remember has two forms. ``state="exact"`` keeps float32 tensors. ``state="window"`` keeps the
numbers of the last W steps and regenerates their directions at each update, a piece of a tensor at a time: no memory that
grows with the weights, and W noise sweeps an update. While no more than W steps were taken, both give the same bits.

A skipped step does not exist for a rule: moments stay, and no step is counted; nor does, for one tensor, a step whose evaluations did
not read that tensor. A step whose coefficients are all 0 was
taken: its gradient is 0, moments shrink, and momentum carries the weights on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..noise import Count, Noise, Update
from ..parameters import TunedTensor
from ..storage import RESIDENT
from .base import decay, require_target
from .moments import Elementwise, WithMoments, arithmetic, small_pieces
from .muon import Muon
from .rule import History, Rule, Step, float32, shares

# Steps handed to one fused sweep over a tensor.
_STEPS_PER_SWEEP = 4096


class SGD(Rule):
    """``theta <- (1 - lr * weight_decay) * theta - lr * g``, in one sweep. See :func:`sgd`."""

    name: ClassVar[str] = "sgd"

    def __init__(self, decay_towards: str = "zero") -> None:
        self.decay_towards = require_target(decay_towards)

    def settings(self) -> dict[str, Any]:
        return {"decay_towards": "base"} if self.decay_towards == "base" else {}

    @property
    def moves_together(self) -> bool:
        return self._moves_here and self.decay_towards == "zero"

    @property
    def _moves_here(self) -> bool:
        return type(self).move is SGD.move  # a class of a user's may move in its own way

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Update:
        return sgd(step, coefficients, lr, weight_decay)

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        unchanged: Count = 0
        shape = tensor.parameter.shape
        if self.decay_towards == "zero" or all(update.decay == 1.0 for update in updates):
            for lo, (piece,) in tensor.pieces():
                for first in range(0, len(updates), _STEPS_PER_SWEEP):
                    fused = updates[first : first + _STEPS_PER_SWEEP]
                    unchanged += noise.update(piece, fused, tensor=tensor.id, start=lo, shape=shape)
            return unchanged
        for lo, (piece,) in small_pieces(tensor):
            x, base = torch.empty(piece.numel(), dtype=arithmetic(piece), device=piece.device), None
            for update in updates:
                if update.is_empty:
                    unchanged += piece.numel()
                    continue
                base = decay(x.copy_(piece), update, history.base, lo, base)
                noise.update(x, [Update(update.step, update.sizes)], tensor=tensor.id, start=lo, shape=shape)
                unchanged += noise.store(piece, x, tensor=tensor.id, step=update.step, start=lo)
        return unchanged

    def reach(self, updates: Sequence[Update], factors: Sequence[float]) -> list[float]:
        return list(factors) if self._moves_here else super().reach(updates, factors)

    def move_together(self, noise: Noise, tensors: Sequence[TunedTensor], updates: Sequence[Update]) -> Count:
        with ExitStack() as stack:
            weights = [t.read() if t.home is RESIDENT else stack.enter_context(t.change()) for t in tensors]
            ids = [tensor.id for tensor in tensors]
            return sum(
                noise.update_many(weights, updates[lo : lo + _STEPS_PER_SWEEP], tensors=ids)
                for lo in range(0, len(updates), _STEPS_PER_SWEEP)
            )


def sgd(step: int, coefficients: Sequence[float], lr: float, weight_decay: float = 0.0) -> Update:
    """Stochastic gradient descent with decoupled weight decay.

    ``theta <- (1 - lr * weight_decay) * theta - lr * (1/n) * sum_k c_k z_k``

    Sizes and factor are computed in float64 and rounded to float32 once.

    Source: MeZO, algorithm 1 (n = 1) and algorithm 2 (n-SPSA); decoupled decay as in AdamW.
    """
    return Update(
        step=step,
        sizes=shares(coefficients, -lr),
        decay=float32(1.0 - lr * weight_decay),
    )


class Sign(Elementwise):
    """``theta <- (1 - lr * weight_decay) * theta - lr * sign(g)``: every weight moves by lr, whatever the loss.

    Where g is 0 nothing but the decay happens.

    Source: ZO-signSGD, Liu et al., "signSGD via Zeroth-Order Oracle", ICLR 2019.
    """

    name: ClassVar[str] = "sign"
    averages: ClassVar[int] = 1
    state = "window"  # of this step alone
    window = 1

    def __init__(self, decay_towards: str = "zero") -> None:
        self.decay_towards = require_target(decay_towards)

    def settings(self) -> dict[str, Any]:
        return {"decay_towards": "base"} if self.decay_towards == "base" else {}

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        add(averages[0], [Update(step.step, step.sizes) for step in steps])

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        return averages[0].sign().mul_(step.lr)


@dataclass(frozen=True)
class Momentum(WithMoments):
    """``m <- mu m + g``, ``theta <- (1 - lr * weight_decay) * theta - lr m``, as torch.optim.SGD with dampening 0.

    In the long run a step is ``1 / (1 - mu)`` times as large as without momentum: take a learning rate as much smaller.

    Attributes:
        momentum: mu, from 0 up to 1, 1 excluded. 0.9 wants a window of 44 steps.

    Source: MeZO, appendix B (momentum from past coefficients).
    """

    momentum: float = 0.9
    name: ClassVar[str] = "momentum"
    averages: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(momentum=self.momentum)

    @property
    def slowest(self) -> float:
        return self.momentum

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        mu = float32(self.momentum)
        add(averages[0], [Update(step.step, step.sizes, mu) for step in steps])

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        return averages[0] * step.lr

    def reach(self, updates: Sequence[Update], factors: Sequence[float]) -> list[float]:
        mu, result = float32(self.momentum), [0.0] * len(updates)
        own = [i for i, update in enumerate(updates) if update.sizes]
        moved = {i: -getattr(updates[i], "lr", 1.0) * factors[i] for i in own}
        if self.window is None:
            reach = 0.0
            for i in reversed(own):
                result[i] = reach = moved[i] + mu * reach
            return result
        place = list(accumulate(bool(update.sizes or update.unused) for update in updates))
        for n, i in enumerate(own):
            # Of the step itself, and of those in whose windows it is.
            for later in reversed([j for j in own[n : n + self.window] if place[j] - place[i] < self.window]):
                result[i] = moved[later] + mu * result[i]
        return result


@dataclass(frozen=True)
class Adam(WithMoments):
    """AdamW: ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, and with decoupled weight decay

    ``theta <- (1 - lr * weight_decay) * theta - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)``

    t counts the steps in the averages, at most W in a window, so the weights of what is averaged add up to 1.

    A weight moves by about ``lr sqrt((1 - b1) / (1 + b1))``, 0.23 lr, whatever the size of the loss: learning rates are not
    those of sgd.

    Attributes:
        beta1, beta2: from 0 up to 1, 1 excluded. The default of 0.95 in the place of 0.999 is that of zeroth-order Adam on
            many probes (SubZero+), and keeps a window short: 90 steps, for 0.999 it would be 4,603.
        epsilon: keeps the division from 0; positive.
        root: how the square root is rounded: to ``"nearest"``, or as the ``"library"`` behind torch does, which on a CPU may be a last
            place off. Logs that do not say it have the latter.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; moments from past
    coefficients: MeZO, appendix B, and AdaMeZO (Cai et al., 2026, arXiv 2605.00650), whose window is this one.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    root: str = "nearest"
    name: ClassVar[str] = "adam"
    averages: ClassVar[int] = 2
    unsaid: ClassVar[dict[str, Any]] = {"root": "library"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(beta1=self.beta1, beta2=self.beta2)
        if not (isinstance(self.epsilon, (int, float)) and 1e-37 < self.epsilon < math.inf):
            raise InputError(f"epsilon must be a positive number, got {self.epsilon!r}: the default is 1e-8")
        if self.root not in ("nearest", "library"):
            raise InputError(f"root must be 'nearest' or 'library', got {self.root!r}")

    @property
    def slowest(self) -> float:
        return max(self.beta1, self.beta2)

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Step:
        planned = super().plan(step, coefficients, lr, weight_decay)
        float32((4 * sum(map(abs, planned.sizes))) ** 2)  # no |z| is larger than 4: its square must fit into v
        return planned

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        m, v = averages
        g = torch.empty_like(m)
        for step in steps:
            add(g.zero_(), [Update(step.step, step.sizes)])
            m.mul_(float32(self.beta1)).add_(g * float32(1 - self.beta1))
            v.mul_(float32(self.beta2)).add_(g.mul_(g).mul_(float32(1 - self.beta2)))

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        m, v = averages
        scale = float32(1 / math.sqrt(1 - power(self.beta2, count)))
        root = (nearest_root(v) if self.root == "nearest" else v.sqrt()).mul_(scale).add_(float32(self.epsilon))
        return torch.div(m, root, out=root).mul_(float32(step.lr / (1 - power(self.beta1, count))))


def nearest_root(v: Tensor) -> Tensor:
    """The square root, rounded to nearest, the same on every device: no root of a float32 number is so near to the middle of two of them
    that the last place of a root in float64 would matter."""
    return v.double().sqrt().to(v.dtype)


def power(base: float, exponent: int) -> float:
    """By squaring: the C library's ``pow`` may round otherwise on another machine."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def require_share(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise InputError(f"{name} must be a number from 0 up to 1, 1 excluded, got {value!r}")


RULES: dict[str, type[Rule]] = {cls.name: cls for cls in (SGD, Sign, Momentum, Adam, Muon)}

AnyRule = TypeVar("AnyRule", bound=type[Rule])


def register_rule(rule: AnyRule) -> AnyRule:
    """Make a class of rules known by its ``name``, so that a step log of a run with it can be written, and read again.

    As a decorator of a class of yours::

        @register_rule
        class Halved(SGD):
            name = "halved"

            def plan(self, step, coefficients, lr, weight_decay):
                return super().plan(step, coefficients, lr / 2, weight_decay)

    Import its module wherever a log is read. The log keeps the name and :meth:`Rule.settings`, not the code: a rule that moves
    weights otherwise than at the time of the run does not replay it. A class that is defined again, as in a notebook, takes the
    place of the first.

    Raises:
        ValueError: the name belongs to another class, or is missing.
    """
    if "name" not in vars(rule):
        raise InputError(f"the rule {rule.__qualname__} has no name of its own: give it one, as in name = 'halved'")
    known = RULES.get(rule.name, rule)
    if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise InputError(f"there is another rule {rule.name!r} already, {known.__qualname__}: choose another name")
    RULES[rule.name] = rule
    return rule


def get_rule(name: str | Rule, **settings: Any) -> Rule:
    """The rule of that name with these settings; a rule stays as it is.

    Raises:
        ValueError: no such rule, or a setting that it does not have or that is out of range.
    """
    if isinstance(name, Rule):
        return name
    if name not in RULES:
        raise InputError(f"unknown rule {name!r}{nearest(str(name), RULES)}: choose one of {', '.join(RULES)}")
    rule = RULES[name]
    known = list(inspect.signature(rule).parameters)
    for key in settings:
        if key not in known:
            raise InputError(
                f"the rule {name!r} has no setting {key!r}{nearest(key, known)}: it has {', '.join(known) or 'none'}"
            )
    return rule(**settings)


def logged_rule(name: str, settings: dict[str, Any]) -> Rule:
    """The rule whose :meth:`Rule.settings` a log has. Raises as :func:`get_rule` does."""
    return get_rule(name, **{**(RULES[name].unsaid if name in RULES else {}), **settings})
