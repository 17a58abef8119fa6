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
============  ==================================================  ==================================================

All of them decay weights first, ``theta <- (1 - lr * weight_decay) * theta``.

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
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..names import STATES
from ..noise import Count, Noise, Update, flattened
from ..parameters import TunedParameters, TunedTensor

# "auto" keeps exact moments if they take at most this share of the memory of the model's weights: adapters do.
_SHARE = 0.1
# A window leaves out steps that together have less than this weight in the average.
_CUT_OFF = 0.01
# Steps handed to one fused sweep over a tensor.
_STEPS_PER_SWEEP = 4096
# Elements handled at once: the temporaries stay in the cache of a CPU, and a GPU has enough to do.
_PIECE = {"cpu": 1 << 18}
_PIECE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Step(Update):
    """One step of a rule that is not linear in g: ``sizes`` give the estimate, ``g = sum_k sizes[k] z_k``.

    Attributes:
        lr: learning rate, a float32 number.
    """

    lr: float = 1.0


@dataclass
class History:
    """What a rule knows of the steps before, the same for all tensors but for the moments.

    Attributes:
        taken: number of steps taken, skipped ones not counted.
        recent: the last W of them, for ``state="window"``.
        moments: flat float32 tensors under the name of each tuned tensor, for ``state="exact"``.
        missed: how many of the steps taken left a tensor alone, by its id.
    """

    taken: int = 0
    recent: list[Update] = field(default_factory=list)
    moments: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    missed: dict[int, int] = field(default_factory=dict)

    def take(self, updates: Sequence[Update], window: int | None) -> None:
        """Count steps that were taken, of which the last ``window`` are kept."""
        self.taken += len(updates)
        self.recent = [*self.recent, *updates][-window:] if window else []
        for update in updates:
            for number in update.unused:
                self.missed[number] = self.missed.get(number, 0) + 1

    def without_moments(self) -> History:
        """A copy of the rest."""
        return History(self.taken, list(self.recent), missed=dict(self.missed))

    def of(self, tensor: int) -> History:
        """The history of one tensor, without the steps that left it alone."""
        if not self.missed.get(tensor):
            return self
        recent = [update for update in self.recent if tensor not in update.unused]
        return replace(self, taken=self.taken - self.missed[tensor], recent=recent)


class Rule(ABC):
    """What is done with the estimate. A class of your own needs a name and :func:`register_rule` for its runs to be logged."""

    name: ClassVar[str]

    @property
    def remembers(self) -> bool:
        """Whether a step depends on steps before it."""
        return False

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be chosen by the tuned weights."""
        return True

    def settings(self) -> dict[str, Any]:
        """What the step log's header says of the rule beside its name; ``type(rule)(**settings)`` is the rule."""
        return {}

    def settled(self, tuned: TunedParameters) -> Rule:
        """The rule with everything chosen that was left to be chosen by the tuned weights."""
        return self

    @abstractmethod
    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Update:
        """One step in float32 numbers. Raises OverflowError when it does not fit them."""

    @abstractmethod
    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        """Apply steps to one tensor, in place. ``history`` is that before the first of them.

        Args:
            updates: steps in order; one without sizes was skipped.
            keep: leave the tensor's moments after the last step in ``history.moments``.

        Returns:
            How many stored values did not change, summed over the steps; it may be a tensor that was not read yet.
        """


class SGD(Rule):
    """``theta <- (1 - lr * weight_decay) * theta - lr * g``, in one sweep. See :func:`sgd`."""

    name: ClassVar[str] = "sgd"

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Update:
        return sgd(step, coefficients, lr, weight_decay)

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        return sum(
            noise.update(tensor.parameter, updates[lo : lo + _STEPS_PER_SWEEP], tensor=tensor.id)
            for lo in range(0, len(updates), _STEPS_PER_SWEEP)
        )


def sgd(step: int, coefficients: Sequence[float], lr: float, weight_decay: float = 0.0) -> Update:
    """Stochastic gradient descent with decoupled weight decay.

    ``theta <- (1 - lr * weight_decay) * theta - lr * (1/n) * sum_k c_k z_k``

    Sizes and factor are computed in float64 and rounded to float32 once.

    Source: MeZO, algorithm 1 (n = 1) and algorithm 2 (n-SPSA); decoupled decay as in AdamW.
    """
    count = len(coefficients)
    return Update(
        step=step,
        sizes=tuple(_float32(-lr * c / count) for c in coefficients),
        decay=_float32(1.0 - lr * weight_decay),
    )


class Elementwise(Rule):
    """A rule that needs averages of g element by element.

    A subclass declares :attr:`averages`, :meth:`fold` and :meth:`direction`. Arithmetic is float32 (float64 for float64
    weights) in separate additions, multiplications, divisions and square roots, each rounded once, so it gives the same
    bits on every device. Nothing is divided by a plain number, which GPUs turn into a multiplication.
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
        count = len(coefficients)
        return Step(
            step=step,
            sizes=tuple(_float32(c / count) for c in coefficients),
            decay=_float32(1.0 - lr * weight_decay),
            lr=_float32(lr),
        )

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        unchanged: Count = 0
        with flattened(tensor.parameter) as flat:
            moments = history.moments.get(tensor.name)
            if moments is None and keep and self.state == "exact":
                with torch.inference_mode(False):  # they outlive the step, whatever mode it is taken in
                    moments = history.moments[tensor.name] = _zeros(self.averages, flat)
            size = _PIECE.get(flat.device.type, _PIECE_ELSEWHERE)
            for lo in range(0, flat.numel(), size):
                piece = flat[lo : lo + size]
                parts = _zeros(self.averages, piece) if moments is None else [m[lo : lo + size] for m in moments]
                unchanged += self._move_piece(noise, piece, parts, updates, history, {"tensor": tensor.id, "start": lo})
        return unchanged

    def _move_piece(
        self,
        noise: Noise,
        piece: Tensor,
        averages: Sequence[Tensor],
        updates: Sequence[Update],
        history: History,
        where: dict[str, int],
    ) -> Count:
        def add(x: Tensor, steps: list[Update]) -> None:
            noise.update(x, steps, **where)

        unchanged: Count = 0
        x = torch.empty(piece.numel(), dtype=_arithmetic(piece), device=piece.device)
        count, recent = history.taken, deque(history.recent, self.window)
        for update in updates:
            if not update.sizes:
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
                self.fold(averages, list(recent), add)
                count = len(recent)
            x.copy_(piece)
            if update.decay != 1.0:
                x.mul_(update.decay)
            x.sub_(self.direction(averages, update, count))
            unchanged += noise.store(piece, x, step=update.step, **where)
        return unchanged


class Sign(Elementwise):
    """``theta <- (1 - lr * weight_decay) * theta - lr * sign(g)``: every weight moves by lr, whatever the loss.

    Where g is 0 nothing but the decay happens.

    Source: ZO-signSGD, Liu et al., "signSGD via Zeroth-Order Oracle", ICLR 2019.
    """

    name: ClassVar[str] = "sign"
    averages: ClassVar[int] = 1
    state = "window"  # of this step alone
    window = 1

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        add(averages[0], [Update(step.step, step.sizes) for step in steps])

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        return averages[0].sign().mul_(step.lr)


@dataclass(frozen=True)
class Remembering(Elementwise):
    """What rules with moments have in common: the form in which they remember.

    Attributes:
        state: ``"exact"``, ``"window"``, or ``"auto"``: exact if the moments take at most a tenth of the memory of the
            model's weights, as for adapters, else window.
        window: W, the number of steps in a window. By default as many as leave out less than 1% of the average.

    Raises:
        ValueError: an argument out of range.
    """

    state: str = field(default="auto", kw_only=True)
    window: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
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
    def is_settled(self) -> bool:
        return self.state == "exact" or (self.state == "window" and self.window is not None)

    def settled(self, tuned: TunedParameters) -> Rule:
        state = self.state
        if state == "auto":
            everything = tuned.module.parameters() if tuned.module is not None else [t.parameter for t in tuned]
            model = sum(parameter.numel() * parameter.element_size() for parameter in everything)
            exact = self.window is None and 4 * self.averages * tuned.numel <= _SHARE * model
            state = "exact" if exact else "window"
        if state == "exact" or self.window is not None:
            return replace(self, state=state)
        return replace(self, state=state, window=_window(self.slowest))

    def settings(self) -> dict[str, Any]:
        own = [setting.name for setting in fields(self) if setting.name not in ("state", "window")]
        settings = {key: getattr(self, key) for key in (*own, "state", "window")}
        return {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class Momentum(Remembering):
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
        _require_share(momentum=self.momentum)

    @property
    def slowest(self) -> float:
        return self.momentum

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        mu = _float32(self.momentum)
        add(averages[0], [Update(step.step, step.sizes, mu) for step in steps])

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        return averages[0] * step.lr


@dataclass(frozen=True)
class Adam(Remembering):
    """AdamW: ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, and with decoupled weight decay

    ``theta <- (1 - lr * weight_decay) * theta - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)``

    t counts the steps in the averages, at most W in a window, so the weights of what is averaged add up to 1.

    A weight moves by about ``lr sqrt((1 - b1) / (1 + b1))``, 0.23 lr, whatever the size of the loss: learning rates are not
    those of sgd.

    Attributes:
        beta1, beta2: from 0 up to 1, 1 excluded. The default of 0.95 in the place of 0.999 is that of zeroth-order Adam on
            many probes (SubZero+), and keeps a window short: 90 steps, for 0.999 it would be 4,603.
        epsilon: keeps the division from 0; positive.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; moments from past
    coefficients: MeZO, appendix B, and AdaMeZO (Cai et al., 2026, arXiv 2605.00650), whose window is this one.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    name: ClassVar[str] = "adam"
    averages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(beta1=self.beta1, beta2=self.beta2)
        if not (isinstance(self.epsilon, (int, float)) and 1e-37 < self.epsilon < math.inf):
            raise InputError(f"epsilon must be a positive number, got {self.epsilon!r}: the default is 1e-8")

    @property
    def slowest(self) -> float:
        return max(self.beta1, self.beta2)

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Step:
        planned = super().plan(step, coefficients, lr, weight_decay)
        _float32((4 * sum(map(abs, planned.sizes))) ** 2)  # no |z| is larger than 4: its square must fit into v
        return planned

    def fold(
        self, averages: Sequence[Tensor], steps: Sequence[Update], add: Callable[[Tensor, list[Update]], object]
    ) -> None:
        m, v = averages
        g = torch.empty_like(m)
        for step in steps:
            add(g.zero_(), [Update(step.step, step.sizes)])
            m.mul_(_float32(self.beta1)).add_(g * _float32(1 - self.beta1))
            v.mul_(_float32(self.beta2)).add_(g.mul_(g).mul_(_float32(1 - self.beta2)))

    def direction(self, averages: Sequence[Tensor], step: Step, count: int) -> Tensor:
        m, v = averages
        scale = _float32(1 / math.sqrt(1 - _power(self.beta2, count)))
        root = v.sqrt().mul_(scale).add_(_float32(self.epsilon))
        return torch.div(m, root, out=root).mul_(_float32(step.lr / (1 - _power(self.beta1, count))))


RULES: dict[str, type[Rule]] = {cls.name: cls for cls in (SGD, Sign, Momentum, Adam)}

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


def move_all(
    rule: Rule,
    noise: Noise,
    tuned: TunedParameters,
    updates: Sequence[Sequence[Update]],
    history: History,
    *,
    keep: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Apply steps to all tuned tensors, a tensor at a time, and take them into the history.

    Args:
        updates: for every parameter group the same steps, in order.
        keep: whether ``history.moments`` are wanted afterwards; without them they are never whole in memory.
        progress: called with the numbers of tensors done and in all.

    Returns:
        How many stored values did not change, summed over the steps.
    """
    ragged = any(update.unused for update in updates[0])
    counts = []
    for done, tensor in enumerate(tuned):
        own = updates[tensor.group]
        if ragged:
            own = [Update(update.step, ()) if tensor.id in update.unused else update for update in own]
        counts.append(rule.move(noise, tensor, own, history.of(tensor.id), keep=keep))
        if progress is not None:
            progress(done + 1, len(tuned))
    if rule.remembers:
        # All groups have the same coefficients, and so the same estimate.
        history.take([update for update in updates[0] if update.sizes], getattr(rule, "window", None))
    return _total(counts)


def _total(counts: Sequence[Count]) -> int:
    """The sum. Each device is waited for once, after all of its sweeps were launched."""
    there: dict[torch.device, list[Tensor]] = {}
    for count in counts:
        if isinstance(count, Tensor):
            there.setdefault(count.device, []).append(count)
    sums = [torch.stack(of_device).sum() for of_device in there.values()]
    return sum(count for count in counts if not isinstance(count, Tensor)) + sum(map(int, sums))


def _zeros(count: int, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(like.numel(), dtype=_arithmetic(like), device=like.device) for _ in range(count))


def _arithmetic(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _float32(x: float) -> float:
    """The nearest float32 value; OverflowError beyond its range."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _power(base: float, exponent: int) -> float:
    """By squaring: the C library's ``pow`` may round otherwise on another machine."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _window(factor: float) -> int:
    """The least W with ``factor^W < 1%``."""
    weight, window = factor, 1
    while weight >= _CUT_OFF:
        weight, window = weight * factor, window + 1
    return window


def _require_share(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise InputError(f"{name} must be a number from 0 up to 1, 1 excluded, got {value!r}")
