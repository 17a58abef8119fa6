"""L3: is the perturbation scale right? It must move the loss by more than rounding does, and by less than its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..files import plain
from ..method.estimators import Query
from ..optimizer import MeZO
from ..points import Closure, Perturbation
from .budget import SCALE_DIRECTIONS

# Signal over noise that is enough: below it, more than a tenth of a coefficient's variance is rounding.
_ENOUGH = 3.0
# So much of a perturbation must survive when the perturbed weights are rounded to their dtype.
_KEPT = 0.5
# Above this share of disagreement between coefficients at two scales, the loss is curved at the larger one.
_CURVED = 0.5
# So small a change of scale moves the loss by little, but rounds what is computed from the weights anew.
_NUDGE = 1.01
_RATIO = 10**0.5
# Directions of the measurements: far from any step's.
_STEP = 2**30
# Elements of each tensor by which the rounding of perturbed weights is measured.
_SAMPLE = 2**16
_ADVICE = "choose float32, a larger batch, or a larger eps"


@dataclass(frozen=True)
class Scale:
    """What was measured at one perturbation scale.

    Attributes:
        eps: the scale.
        signal: root mean square of ``L(theta + eps z) - L(theta - eps z)`` over directions z.
        noise: standard deviation of one evaluation by rounding, from ``L(theta + 1.01 eps z) - L(theta + eps z)`` less the
            slope and the curvature that the losses at both sides and in the middle show.
        kept: share of ``|eps z|^2`` that is left when the perturbed weights are rounded to their dtype; near 0 where eps is
            far below their spacing. A nudge would then round nothing anew, and the noise would seem small.
        coefficients: projected gradient in each direction.
        evaluations: forward passes that this took.
    """

    eps: float
    signal: float
    noise: float
    kept: float
    coefficients: tuple[float, ...]
    evaluations: int

    @property
    def is_finite(self) -> bool:
        """Whether the model gave losses at this scale, and not only infinities."""
        return math.isfinite(self.signal) and math.isfinite(self.noise)

    @property
    def survives(self) -> bool:
        """Whether enough of a perturbation is left in the weights' dtype."""
        return self.kept > _KEPT

    @property
    def is_clear(self) -> bool:
        """Whether the weights move as they should, and the signal stands out of the noise of two evaluations."""
        return self.is_finite and self.survives and self.signal > _ENOUGH * math.sqrt(2) * self.noise

    @property
    def is_hidden(self) -> bool:
        """Whether losses differ by no more than rounding alone makes them, so that a run would learn nothing."""
        return self.is_finite and not (self.survives and self.signal > math.sqrt(2) * self.noise)

    def content(self) -> dict[str, Any]:
        """What a step log says of it, as JSON."""
        return {"eps": self.eps, "signal": plain(self.signal), "noise": plain(self.noise), "kept": self.kept}


def measure(optimizer: MeZO, closure: Closure, eps: float, directions: int = SCALE_DIRECTIONS) -> Scale:
    """Evaluate one minibatch in the middle, at both sides of some directions, and a nudge further on one side.

    The weights stay. All examples have one direction, whatever the run's assignment: the loss is the minibatch's. The first call's
    self-check takes a few evaluations more.

    Raises:
        ValueError: ``eps`` is not positive.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, got {eps!r}")
    queries = [query._replace(stride=0) for query in optimizer.estimator.queries()]
    perturbation = optimizer.evaluator.prepare(optimizer.next_step, queries, closure)
    differences, nudges = [], []
    with torch.no_grad(), perturbation:
        middle = _at(perturbation, 0, 0.0, closure)
        for direction in range(directions):
            plus, nudged, minus = (_at(perturbation, direction, scale, closure) for scale in (eps, _NUDGE * eps, -eps))
            differences.append(plus - minus)
            # What the nudge does to a quadratic loss: the odd part grows in proportion to it, the even part to its square.
            odd, even = (plus - minus) / 2, (plus + minus) / 2 - middle
            nudges.append(nudged - plus - (_NUDGE - 1) * odd - (_NUDGE**2 - 1) * even)
    signal = math.sqrt(sum(d * d for d in differences) / directions)
    noise = math.sqrt(sum(n * n for n in nudges) / directions / 2)
    coefficients = tuple(d / (2 * eps) for d in differences)
    return Scale(eps, signal, noise, _kept(optimizer, eps), coefficients, 3 * directions + 1)


def choose_eps(optimizer: MeZO, closure: Closure, start: float, *, most: int = 4) -> list[Scale]:
    """Scales that were measured, the chosen one last.

    From ``start`` the scale grows by the square root of ten while rounding hides the signal, and falls by as much while
    losses are not finite. If the signal is clear at once, the scale is compared with one smaller by the same factor: where
    coefficients disagree by more than half and the smaller scale is clear too, the loss is curved on the way, and the
    smaller scale is taken, and so on.

    Args:
        optimizer: its noise and its weights are used; nothing is changed.
        closure: the loss of one minibatch, the same each time.
        start: the first scale.
        most: scales to measure at most.
    """
    measured = [measure(optimizer, closure, start)]
    if not measured[0].is_finite:
        while not measured[-1].is_finite and len(measured) < most:
            measured.append(measure(optimizer, closure, measured[-1].eps / _RATIO))
        return measured
    while not measured[-1].is_clear and measured[-1].is_finite and len(measured) < most:
        measured.append(measure(optimizer, closure, measured[-1].eps * _RATIO))
    if len(measured) > 1:
        # If rounding hides the loss at every scale, as where the loss is flat, nothing speaks against the first.
        return measured if measured[-1].is_clear else [*measured[1:], measured[0]]
    while len(measured) < most:
        here, smaller = measured[-1], measure(optimizer, closure, measured[-1].eps / _RATIO)
        if not smaller.is_clear or _disagreement(here, smaller) < _CURVED:
            measured.insert(-1, smaller)
            break
        measured.append(smaller)
    return measured


def set_eps(
    optimizer: MeZO,
    held_out: Callable[[int], Callable[[], float]],
    dtypes: str,
    announce: Callable[[str], object],
    *,
    most: int,
) -> dict[str, Any]:
    """Give the optimizer the eps that :func:`choose_eps` finds from its own, with a word to people. Returns what a log says of it.

    Args:
        held_out: gives the loss of so many minibatches of held-out examples.
        dtypes: those in which the loss is computed, for messages.
        announce: takes a line each.
        most: scales to measure at most; with 0 eps stays.
    """
    measured = choose_eps(optimizer, held_out(1), optimizer.estimator.eps, most=most) if most else []
    if measured:
        chosen = measured[-1]
        if not chosen.is_finite:
            announce(f"the loss is not finite around the untuned weights, down to eps {chosen.eps:.1e}")
        elif chosen.is_hidden:
            highest = max(scale.eps for scale in measured)
            announce(
                f"rounding in {dtypes} hides what a perturbation does to the loss, up to eps {highest:.1e}: {_ADVICE}"
            )
        announce(f"eps {chosen.eps:.1e}: the loss moves by {chosen.signal:.1e}, rounding by {chosen.noise:.0e}")
        optimizer.estimator = replace(optimizer.estimator, eps=chosen.eps)
    return {
        "chosen": optimizer.estimator.eps,
        "tried": [scale.content() for scale in measured],
        "evaluations": sum(scale.evaluations for scale in measured),
    }


def check_eps(optimizer: MeZO, closure: Closure, dtypes: str, announce: Callable[[str], object]) -> None:
    """Warn of a given eps with which a run of some length would learn from rounding."""
    scale = measure(optimizer, closure, optimizer.estimator.eps)
    if not scale.survives:
        announce(
            f"eps {scale.eps:.1e} is below the spacing of weights in {dtypes}, which keeps {scale.kept:.0%} of a perturbation: "
            f"{_ADVICE}, or let it be found (auto)"
        )
    elif scale.is_finite and scale.signal and not scale.is_clear:
        announce(
            f"eps {scale.eps:.1e} moves the loss by {scale.signal:.0e}, of which rounding in {dtypes} is up to "
            f"{math.sqrt(2) * scale.noise:.0e}: {_ADVICE}, or let it be found (auto)"
        )


@torch.no_grad()
def _kept(optimizer: MeZO, eps: float) -> float:
    lost = whole = 0.0
    for tensor in optimizer.tuned:
        weight = tensor.parameter.detach().reshape(-1)[:_SAMPLE]
        moved, move = torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.float32)
        for out, source in ((moved, weight), (move, move)):
            shape = tensor.parameter.shape
            optimizer.noise.perturb(out, source, tensor=tensor.id, step=_STEP, probe=0, scale=eps, shape=shape)
        move = move.double()
        lost += float((moved.double() - weight.double() - move).square().sum())
        whole += float(move.square().sum())
    return 1 - lost / whole if whole else 0.0


def _disagreement(a: Scale, b: Scale) -> float:
    """Root mean square of the difference of the coefficients over that of the smaller scale's."""
    size = math.sqrt(sum(c * c for c in b.coefficients))
    return math.dist(a.coefficients, b.coefficients) / size if size else math.inf


def _at(perturbation: Perturbation, direction: int, scale: float, closure: Closure) -> float:
    perturbation.shift(_STEP, Query(direction, scale))
    return float(closure())
