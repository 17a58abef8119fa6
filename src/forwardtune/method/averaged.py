"""The average of a run's weights, as a rule: each tensor in one float32 sum, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..errors import InputError
from ..noise import Count, Noise, Update
from ..parameters import TunedTensor
from .moments import arithmetic, small_pieces
from .rule import History, Rule, float32

_STEPS_PER_SWEEP = 4096


@dataclass(frozen=True)
class Averaged(Rule):
    """Moves base weights to ``sum_t shares[t] theta_t``, where theta_t is what another rule's first t steps would make of them in exact numbers.

    A linear rule makes of the weights ``theta_t = d_t theta_{t-1} + a_t``, with a_t a sum of directions. So the average is a sum of the same
    directions with other factors, and of the base weights: the updates of :func:`summed`, which are applied to a float32 copy of the
    weights, a piece at a time. What comes of it is stored once, rounded as a step with number T, the number of steps, would be: exactly in
    float32, stochastically in half precision. Nothing is rounded in between, so in half precision the average over the last step alone is
    not the weights of the run, but what they stand for.

    Attributes:
        rule: the run's, whose updates these are.
        shares: of the weights after 0, 1, ... T steps; they add up to 1.
    """

    rule: Rule
    shares: tuple[float, ...]
    name: ClassVar[str] = "averaged"
    _sums: dict[tuple[int, bytes], list[Update]] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Update:
        return self.rule.plan(step, coefficients, lr, weight_decay)

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        # Tensors of a group that took the same steps have one sum.
        which = (tensor.group, bytes(2 * bool(update.sizes) + bool(update.unused) for update in updates))
        if which not in self._sums:
            self._sums[which] = summed(self.rule, updates, self.shares)
        terms, shape = self._sums[which], tensor.parameter.shape
        unchanged: Count = 0
        for lo, (piece,) in small_pieces(tensor):
            x: Tensor = piece.to(arithmetic(piece), copy=True)
            for first in range(0, len(terms), _STEPS_PER_SWEEP):
                noise.update(x, terms[first : first + _STEPS_PER_SWEEP], tensor=tensor.id, start=lo, shape=shape)
            unchanged += noise.store(piece, x, tensor=tensor.id, step=len(updates), start=lo)
        return unchanged


def summed(rule: Rule, updates: Sequence[Update], shares: Sequence[float]) -> list[Update]:
    """The updates that bring a float32 tensor from the base weights to ``sum_t shares[t] theta_t``.

    With d_t the decay of step t, let ``b_t = shares[t] + d_{t+1} b_{t+1}``: how much of theta_t is in the average. What step t adds counts b_t
    times. The base counts ``A_1``, where ``A_{T+1} = 1``, ``A_t = A_{t+1} - (1 - d_t) b_t``; for rows that step t was the first to read, A_t.
    So update t multiplies by ``A_t / A_{t+1}`` and then adds its directions, which the later ones multiply by A_{t+1}, divided by that.
    Where weights decay towards the base, what they moved decays alone, and ``A_t = 1``. Factors are computed in float64 and rounded once.

    Raises:
        InputError: the rule is not linear, or a step decayed weights to nothing.
    """
    anchored = rule.decay_towards == "base"  # what moved decays, and the base counts whole
    if not anchored and any(update.decay <= 0 for update in updates):
        raise InputError(
            "a step took all of the weights by weight decay, so their average has no base: lower weight decay or rate"
        )
    counts = [0.0] * len(updates)
    base = [1.0] * (len(updates) + 1)
    ahead = 0.0
    for t in reversed(range(len(updates))):
        counts[t] = ahead = shares[t + 1] + ahead
        base[t] = 1.0 if anchored else base[t + 1] - (1 - updates[t].decay) * ahead
        ahead *= updates[t].decay
    reach = rule.reach(updates, counts)
    return [
        Update(
            update.step,
            tuple(float32(reach[t] / base[t + 1] * size) for size in update.sizes),
            float32(base[t] / base[t + 1]),
        )
        for t, update in enumerate(updates)
    ]
