"""L2: where the loss is queried, and how the losses become coefficients.

An estimator is a declaration: :meth:`Estimator.queries` lists points ``theta + scale * z_probe``, and
:meth:`Estimator.coefficients` turns the losses there into one projected gradient per direction. It knows nothing of models.

Directions are assigned in one of two ways. ``shared``: the whole minibatch is evaluated along each direction, and the loss of a
query is one number. ``example``: every example has directions of its own, the losses of a query come one per example, and the
estimate is the mean of the examples' estimates. At the same number of forward passes its variance is smaller by
``(B + rho) / (1 + rho)``, with B examples and ``rho = tr Sigma / |g|^2``, the variance of an example's gradient in units of
the gradient. In between, ``group_size`` m examples, one after the other, share directions, and their loss is one number: there are fewer
directions, and the variance of a group's gradient is smaller than that of an example's by m, by more where its examples are of different labels.

A normalisation puts another number ``u`` in the place of each loss l, in units that do not depend on the loss:

=========  ============================  =====================================================================
name       u                             afterwards
=========  ============================  =====================================================================
``none``   ``l / eps``                   coefficients are derivatives along the directions
``sigma``  ``l / std(l)``                multiplying the loss by a number changes nothing (FZOO)
``rank``   rank of l, from -1/2 to 1/2   no monotonic change of the loss changes anything (evolution strategies)
``spread`` ``l / spread``                as ``sigma``, over all directions of a step, of examples too
=========  ============================  =====================================================================

``sigma`` and ``rank`` compare the losses of the probes, of an example with directions of its own those of its probes. Losses of different
examples cannot be compared, as examples differ, but their differences can: ``spread`` is the root mean square of the differences along all
directions of the step, examples or probes. The sign of a direction is arbitrary, so their mean says nothing and is not taken off.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

from ..errors import InputError, nearest
from ..names import ASSIGNMENTS, NORMALIZATIONS

#: The losses of one query: that of the minibatch, or one for each example.
Losses: TypeAlias = "tuple[float, ...]"


class Query(NamedTuple):
    """One evaluation of the minibatch, at ``theta + scale * z``; at scale 0, theta itself.

    Attributes:
        probe: number of the direction; of the first one where every example has its own.
        scale: in units of the weights.
        stride: example b is evaluated along direction ``probe + b * stride``; 0: all along the same one.
        group: with a stride, so many examples, one after the other, count as one (:func:`groups_of`).
    """

    probe: int
    scale: float
    stride: int = 0
    group: int = 1

    @property
    def per_example(self) -> bool:
        """Whether every example has a direction, and a loss, of its own."""
        return self.stride > 0

    def after(self, examples: int) -> Query:
        """The same for a microbatch before which so many examples, or groups of them, of the step were evaluated."""
        return self._replace(probe=self.probe + examples * self.stride)

    def directions(self, examples: int) -> range:
        """Numbers of the directions of so many examples; the one direction of a shared query."""
        return (
            range(self.probe, self.probe + examples * self.stride, self.stride)
            if self.stride
            else range(self.probe, self.probe + 1)
        )


def groups_of(examples: int, size: int) -> int:
    """In how many groups of about that size so many examples are: at least one. Example b is in group ``b * groups // examples``."""
    return max(1, (2 * examples + size) // (2 * size))


@dataclass(frozen=True)
class Estimator(ABC):
    """Gradient estimate ``g = mean_k c_k z_k`` from the losses at the queried points.

    Attributes:
        eps: perturbation scale, in units of the weights.
        probes: n, the number of directions, of the step or of each of its examples.
        normalize: what the differences of losses are measured in: ``"none"``, ``"sigma"``, ``"rank"`` or ``"spread"``.
        assignment: ``"shared"`` or ``"example"``. Probe k of example b is direction number ``b n + k`` of the step.
        group_size: with ``"example"``, m: so many examples have directions together. The loss of a group is the sum of its examples' losses
            times groups over examples, so that the mean over groups is the mean over examples.

    Raises:
        ValueError: an argument out of range, or a normalisation over fewer than two probes.
    """

    eps: float = 1e-3
    probes: int = 1
    normalize: str = "none"
    assignment: str = "shared"
    group_size: int = 1
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not (isinstance(self.eps, (int, float)) and 0 < self.eps < float("inf")):
            raise InputError(f"eps must be a positive number, got {self.eps!r}: MeZO's default is 1e-3")
        if not (isinstance(self.probes, int) and self.probes >= 1):
            raise InputError(f"probes must be an integer of at least 1, got {self.probes!r}")
        for setting, known in (("normalize", NORMALIZATIONS), ("assignment", ASSIGNMENTS)):
            value = getattr(self, setting)
            if value not in known:
                raise InputError(
                    f"unknown {setting} {value!r}{nearest(str(value), known)}: choose one of {', '.join(known)}"
                )
        size = self.group_size
        if isinstance(size, bool) or not (isinstance(size, int) and size >= 1):
            raise InputError(f"group_size must be an integer of at least 1, got {size!r}")
        if size > 1 and not self.per_example:
            raise InputError(
                "group_size is of examples that have directions: set assignment='example', or leave it out",
                "group_size",
            )
        if self.normalize != "none" and self.probes < 2 and not self._compares_examples:
            raise InputError(
                f"normalize={self.normalize!r} compares the probes of a step, and there is one: set probes to 2 or more"
            )

    @property
    def per_example(self) -> bool:
        """Whether every example has directions of its own."""
        return self.assignment == "example"

    @property
    def _compares_examples(self) -> bool:
        return self.per_example and self.normalize == "spread"

    @abstractmethod
    def queries(self) -> list[Query]:
        """The points of one step, in the order in which they are evaluated."""

    def query(self, probe: int, scale: float) -> Query:
        """A point along that probe, of the minibatch or of each of its examples."""
        return Query(probe, scale, self.probes, self.group_size) if self.per_example else Query(probe, scale)

    def merge(self, gathered: Sequence[Losses] | None, losses: Sequence[Losses]) -> list[Losses]:
        """Losses at :meth:`queries` of a further microbatch: added to those of the ones before, or appended, one per example."""
        if gathered is None:
            return list(losses)
        if self.per_example:
            return [a + b for a, b in zip(gathered, losses, strict=True)]
        return [(a + b,) for (a,), (b,) in zip(gathered, losses, strict=True)]

    @property
    def shared(self) -> int:
        """How many queries, at the beginning, serve all probes; the others are as many for each, probe by probe."""
        return 0

    def coefficients(self, losses: Sequence[float]) -> list[float]:
        """One coefficient ``c_k`` for each probe of the minibatch, or of one example, from its losses at :meth:`queries`.

        NaN for a probe of which a loss is not finite, or whose coefficient would not be: the estimate is the mean over the others.
        A normalisation compares what is there, two probes at least.
        """
        shared = self.shared
        size = (len(losses) - shared) // self.probes
        own = [losses[i : i + size] for i in range(shared, len(losses), size)]
        present = [all(map(math.isfinite, [*losses[:shared], *part])) for part in own]
        found = [math.nan] * self.probes
        if sum(present) < (1 if self.normalize in ("none", "spread") else 2):
            return found
        known = [*losses[:shared], *(loss for part, there in zip(own, present, strict=True) if there for loss in part)]
        places = (k for k, there in enumerate(present) if there)
        for k, c in zip(places, self.of_finite(known), strict=True):
            found[k] = c if math.isfinite(c) else math.nan
        return found

    def of_step(self, coefficients: Sequence[float]) -> list[float]:
        """The coefficients of a step, given those of its probes, or of all its examples: divided by their spread, or as they are."""
        if self.normalize != "spread":
            return list(coefficients)
        known = [c for c in coefficients if math.isfinite(c)]
        spread = math.sqrt(math.fsum(c * c for c in known) / len(known)) if known else math.nan
        return [c / spread if spread else c for c in coefficients]

    @abstractmethod
    def of_finite(self, losses: Sequence[float]) -> list[float]:
        """The coefficients of probes all of whose losses are finite, those of every probe in the order of its queries."""

    def settings(self) -> dict[str, Any]:
        """What the step log's header says of the estimator."""
        settings = {"estimator": self.name, "eps": self.eps, "probes": self.probes}
        defaults = {"normalize": "none", "assignment": "shared", "group_size": 1}
        return settings | {key: getattr(self, key) for key, usual in defaults.items() if getattr(self, key) != usual}


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided simultaneous perturbation, ``c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)``.

    With ``probes`` = n > 1 this is n-SPSA: the estimate is the mean of ``c_k z_k`` over n directions. A step costs 2 n
    evaluations. Normalised, ``c_k = (u_k+ - u_k-) / 2`` with the deviation or the ranks of all 2 n losses, so with
    ``sigma`` no coefficient is larger than ``sqrt(n - 1/2)``, and with ``rank`` none than 1/2.

    Source: MeZO, section 2 (definition 1) and appendix A; Spall, IEEE TAC 37(3), 1992. Ranks of both sides together:
    Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017.
    """

    name: ClassVar[str] = "spsa"

    def queries(self) -> list[Query]:
        return [self.query(probe, sign * self.eps) for probe in range(self.probes) for sign in (+1.0, -1.0)]

    def of_finite(self, losses: Sequence[float]) -> list[float]:
        pairs = list(zip(losses[0::2], losses[1::2], strict=True))
        if self.normalize == "rank":
            ranks = centred_ranks(losses)
            return [(plus - minus) / 2 for plus, minus in zip(ranks[0::2], ranks[1::2], strict=True)]
        if self.normalize == "sigma":
            return _divided([(plus - minus) / 2 for plus, minus in pairs], losses)
        if self.normalize == "spread":
            return [(plus - minus) / 2 for plus, minus in pairs]
        return [(plus - minus) / (2 * self.eps) for plus, minus in pairs]


@dataclass(frozen=True)
class OneSided(Estimator):
    """Every probe against one evaluation of theta itself, ``c_k = (L(theta + eps z_k) - L(theta)) / eps``.

    A step costs n + 1 evaluations, L(theta) first. Each coefficient is off by ``eps / 2 * z_k' H z_k``, with H the
    Hessian, which the two sides of :class:`SPSA` cancel; averaged over z and -z it cancels too.

    With ``sigma``, ``c_k = (l_k - l_0) / std(l_1 ... l_n)``. With ``rank``, c_k is the centred rank of l_k among the n
    losses; L(theta) would not change it and is not evaluated.

    Source: ``sigma`` with Rademacher directions is FZOO (Dang et al., 2025, arXiv 2506.09034); ``spread`` with a direction for
    each example is the same over examples. Ranks: Salimans et al., 2017.
    """

    name: ClassVar[str] = "one_sided"

    @property
    def shared(self) -> int:
        return 0 if self.normalize == "rank" else 1

    def queries(self) -> list[Query]:
        clean = [] if self.normalize == "rank" else [self.query(0, 0.0)]
        return clean + [self.query(probe, self.eps) for probe in range(self.probes)]

    def of_finite(self, losses: Sequence[float]) -> list[float]:
        if self.normalize == "rank":
            return centred_ranks(losses)
        clean, *there = losses
        if self.normalize == "sigma":
            return _divided([loss - clean for loss in there], there)
        if self.normalize == "spread":
            return [loss - clean for loss in there]
        return [(loss - clean) / self.eps for loss in there]


def centred_ranks(losses: Sequence[float]) -> list[float]:
    """The place of each loss among all, from -1/2 (smallest) to 1/2; equal losses share their mean place."""
    order = sorted(losses)
    last = len(order) - 1
    return [(bisect_left(order, loss) + bisect_right(order, loss) - 1 - last) / (2 * last) for loss in losses]


def _divided(differences: list[float], losses: Sequence[float]) -> list[float]:
    """The differences over the sample standard deviation of the losses; 0 if all losses are equal."""
    if min(losses) == max(losses):
        return [0.0] * len(differences)
    mean = sum(losses) / len(losses)
    deviation = math.hypot(*(loss - mean for loss in losses)) / math.sqrt(len(losses) - 1)
    return [difference / deviation if math.isfinite(deviation) else math.nan for difference in differences]


ESTIMATORS: dict[str, type[Estimator]] = {cls.name: cls for cls in (SPSA, OneSided)}


def get_estimator(
    name: str | Estimator, eps: float, probes: int, normalize: str, assignment: str = "shared", group_size: int = 1
) -> Estimator:
    """The estimator of that name with these settings; an estimator stays as it is.

    Raises:
        ValueError: no such estimator, or a setting out of range.
    """
    if isinstance(name, Estimator):
        return name
    if name not in ESTIMATORS:
        raise InputError(
            f"unknown estimator {name!r}{nearest(str(name), ESTIMATORS)}: choose one of {', '.join(ESTIMATORS)}"
        )
    return ESTIMATORS[name](eps, probes, normalize, assignment, group_size)
