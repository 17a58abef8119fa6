"""What a rule is, and how one moves all tuned tensors."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import Count, Noise, Update, folds_of
from ..parameters import TunedParameters, TunedTensor
from ..storage import at_home_afterwards
from .base import BaseFile, ReadBase, present
from .estimators import Estimator
from .masked import Masked


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
        base: reads the values of one tensor that the run began with, for a rule that decays towards them.
    """

    taken: int = 0
    recent: list[Update] = field(default_factory=list)
    moments: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    missed: dict[int, int] = field(default_factory=dict)
    base: ReadBase | None = None

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

    def state(self, rule: Rule) -> dict[str, Any]:
        """What ``state_dict`` keeps of it; nothing for a rule without memory."""
        if not rule.remembers:
            return {}
        kept = {
            "taken": self.taken,
            "missed": dict(self.missed),
            "recent": [
                (u.step, u.sizes, sorted(u.unused), *([dict(u.unread)] if u.unread else [])) for u in self.recent
            ],
            "moments": {name: list(moments) for name, moments in self.moments.items()},
        }
        return {"rule": {"name": rule.name, "settings": rule.settings(), **kept}}

    @classmethod
    def of_state(cls, saved: dict[str, Any] | None, rule: Rule, tuned: TunedParameters) -> History:
        """What :meth:`state` gave under ``"rule"``, on the devices of the tuned tensors.

        Raises:
            ValueError: it is of another rule, or of other tensors.
        """
        ours = {"name": rule.name, "settings": rule.settings()} if rule.remembers else None
        theirs = {key: saved[key] for key in ("name", "settings")} if saved else None
        if ours != theirs:
            raise ValueError(
                f"the state was saved with {_described(theirs)}, this optimizer has {_described(ours)}: use the same rule"
            )
        if saved is None:
            return cls()
        parameters = {tensor.name: tensor.parameter for tensor in tuned}
        moments = {name: [moment.numel() for moment in tensors] for name, tensors in saved["moments"].items()}
        if any(name not in parameters or set(n) != {parameters[name].numel()} for name, n in moments.items()):
            raise ValueError("the state was saved for other tuned tensors: tune the same ones")
        return cls(
            taken=saved["taken"],
            missed=dict(saved.get("missed", {})),
            recent=[_recalled(*update) for update in saved["recent"]],
            moments={
                name: tuple(moment.to(parameters[name].device, copy=True) for moment in tensors)
                for name, tensors in saved["moments"].items()
            },
        )

    def of(self, tensor: int) -> History:
        """The history of one tensor. Steps that left it alone have no sizes there, and their place in a window."""
        if not self.missed.get(tensor):
            return self
        recent = [of_tensor(update, tensor) for update in self.recent]
        return replace(self, taken=self.taken - self.missed[tensor], recent=recent)


def of_tensor(update: Update, tensor: int) -> Update:
    """The update for one tensor: without sizes if it leaves that alone."""
    return Update(update.step, (), unused=update.unused) if tensor in update.unused else update


def _recalled(
    step: int, sizes: Sequence[float], unused: Sequence[int] = (), unread: Mapping[int, Tensor] | None = None
) -> Update:
    return Update(step, tuple(sizes), unused=frozenset(unused), unread=unread or {})


def _described(rule: dict[str, Any] | None) -> str:
    return f"the rule {rule['name']!r} {rule['settings']}" if rule else "a rule without memory"


class Rule(ABC):
    """What is done with the estimate. A class of your own needs a name and :func:`register_rule` for its runs to be logged."""

    name: ClassVar[str]
    #: What holds for settings of which a log says nothing, because they came later.
    unsaid: ClassVar[dict[str, Any]] = {}
    #: What weight decay pulls towards, ``"zero"`` or ``"base"``: ``theta <- theta_0 + d (theta - theta_0)``.
    decay_towards: str = "zero"

    @property
    def remembers(self) -> bool:
        """Whether a step depends on steps before it."""
        return False

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to be chosen by the tuned weights."""
        return True

    def settings(self) -> dict[str, Any]:
        """What the step log's header says of the rule beside its name; ``type(rule)(**settings)`` is the rule."""
        return {}

    def require(self, estimator: Estimator, noise: Noise) -> None:  # noqa: B027 (most rules take all)
        """Raise InputError unless the rule can take the estimates of this estimator along these directions."""

    def resolved(self, tuned: TunedParameters) -> Rule:
        """The rule with everything chosen that was left to be chosen by the tuned weights."""
        return self

    @property
    def moves_together(self) -> bool:
        """Whether :meth:`move_together` is there, for rules that need nothing but the updates."""
        return False

    def move_together(self, noise: Noise, tensors: Sequence[TunedTensor], updates: Sequence[Update]) -> Count:
        """:meth:`move` of several tensors at once."""
        raise NotImplementedError

    def reach(self, updates: Sequence[Update], factors: Sequence[float]) -> list[float]:
        """The weights as one sum over directions: r with ``sum_t factors[t] * a_t = sum_t r[t] * sum_k sizes_t[k] z_tk``, where a_t is what step
        t adds to the weights beside their decay.

        Args:
            updates: steps in order; one without sizes was skipped, or, where something was ``unused``, left the tensor alone.

        Raises:
            InputError: what a step adds is no sum of directions.
        """
        raise InputError(
            f"the rule {self.name!r} does not add up directions, so the average of a run's weights is no list of factors: tune with the rule "
            "sgd or momentum to average"
        )

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


def move_all(
    rule: Rule,
    noise: Noise,
    tuned: TunedParameters,
    updates: Sequence[Sequence[Update]],
    history: History,
    *,
    keep: bool = True,
    from_base: bool = False,
    folded_at: Sequence[int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Apply steps to all tuned tensors, a tensor at a time, and take them into the history.

    Args:
        updates: for every parameter group the same steps, in order.
        keep: whether ``history.moments`` are wanted afterwards; without them they are never whole in memory.
        from_base: the tensors are as the run began.
        folded_at: after how many steps, beside every refresh, steps of matrices of low rank were folded; at the end they are. None: each
            step moved them.
        progress: called with the numbers of tensors done and in all.

    Returns:
        How many stored values did not change, summed over the steps.
    """
    kept = None if rule.decay_towards != "base" or tuned.base is None or from_base else BaseFile(tuned.base, tuned)
    ragged = any(update.unused for update in updates[0])
    counts: list[Count] = []
    together: dict[Any, tuple[Sequence[Update], list[TunedTensor]]] = {}
    kinds: dict[Any, Sequence[Update]] = {}  # most tensors of a group have the same updates
    with at_home_afterwards(tensor.home for tensor in tuned):
        for done, tensor in enumerate(tuned):
            kind = (tensor.group, noise.waits(tensor.parameter.shape), tensor.id if ragged else None)
            if kind not in kinds:
                own = updates[tensor.group]
                if ragged:
                    own = [of_tensor(update, tensor.id) for update in own]
                if folded_at is not None and noise.structure is not None and kind[1]:
                    own = folds_of(own, noise.structure, folded_at)
                kinds[kind] = own
            own = kinds[kind]
            before = history.of(tensor.id)
            if rule.decay_towards == "base":
                before = replace(before, base=present(tensor) if from_base else kept.of(tensor) if kept else None)
            unread = {u.step: u.unread[tensor.id] for u in (*before.recent, *own) if tensor.id in u.unread}
            if not unread and rule.moves_together and noise.moves_together(tensor.parameter):
                shared = tuple(own) if ragged else kind
                together.setdefault((tensor.parameter.device, shared), (own, []))[1].append(tensor)
            else:
                own_noise = Masked.of(noise, tensor.parameter.shape, unread) if unread else noise
                counts.append(rule.move(own_noise, tensor, own, before, keep=keep))
            if progress is not None:
                progress(done + 1, len(tuned))
        counts += [rule.move_together(noise, tensors, own) for own, tensors in together.values()]
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


def shares(coefficients: Sequence[float], factor: float = 1.0) -> tuple[float, ...]:
    """Sizes of the directions in ``factor * mean_k c_k z_k``, float32; the mean is over the coefficients that are no NaN."""
    count = sum(not math.isnan(c) for c in coefficients)
    return tuple(0.0 if math.isnan(c) else float32(factor * c / count) for c in coefficients)


def float32(x: float) -> float:
    """The nearest float32 value; OverflowError beyond its range."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])
