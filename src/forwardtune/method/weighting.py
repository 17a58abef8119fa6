"""L2: where directions fall: layers drawn for each step, small weights alone, and lengths by the size of a layer.

===================  ==================================================================  ===============================================
setting              z of a step                                                         source
===================  ==================================================================  ===============================================
``active_layers``    0 outside of so many layers, drawn anew for each step               LeZO (Wang et al., 2024, arXiv 2410.09823)
``sparsity``         0 where ``|theta|`` is above a threshold of each matrix             Sparse-MeZO (Liu et al., 2024, 2402.15751)
``modify``           variance: evaluated along ``z / d``, updated by ``c d z``;          MeZO, appendix B (d from the norm of a layer's
                     expectation: evaluated along ``z / d``, updated by ``c z``          parameters, or of its gradient)
===================  ==================================================================  ===============================================

A layer is what has a number in the names of its tensors, as in ``model.layers.7``; a tensor outside of all of them, such as an embedding,
takes part in every step and has a d of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import InputError, nearest
from ..names import MODIFIED_BY, MODIFY
from ..noise import Emphasis
from ..parameters import TunedParameters
from .estimators import Losses, Query
from .rule import Rule
from .rules import SGD

#: The first step in whose place the gradients of layers are measured: far from any step's.
_STEP = 2**30 + 2**29
#: Directions for each layer: one, as in the paper, may lie across the gradient, and d is divided by.
_DIRECTIONS = 4
_SIDE_PATHS = ("side_path", "both_signs")
_LAYER = re.compile(r"^(.*?(?:^|\.))(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Weighting:
    """Where directions fall; by default everywhere alike.

    Attributes:
        active_layers: so many layers take part in a step; None: all.
        sparsity: share of every matrix, its largest weights at the beginning of the run, that is left alone. The threshold is fixed, the
            weights above it are those of the moment.
        modify: ``"none"``, ``"variance"`` or ``"expectation"``.
        modify_by: what d is: ``"parameters"``, the norm of a layer's weights at the beginning; ``"gradients"``, of its gradient, estimated
            from losses. It is taken in units in which a perturbation is as long as without it, so eps and rate keep their meaning.

    Raises:
        InputError: a setting out of range.
    """

    active_layers: int | None = None
    sparsity: float = 0.0
    modify: str = "none"
    modify_by: str = "parameters"

    def __post_init__(self) -> None:
        for setting, known in (("modify", MODIFY), ("modify_by", MODIFIED_BY)):
            if (value := getattr(self, setting)) not in known:
                raise InputError(
                    f"unknown {setting} {value!r}{nearest(str(value), known)}: choose one of {', '.join(known)}"
                )
        layers = self.active_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise InputError(f"active_layers must be an integer of at least 1, got {layers!r}")
        if not (isinstance(self.sparsity, (int, float)) and 0 <= self.sparsity < 1):
            raise InputError(f"sparsity must be a share from 0 up to 1, 1 excluded, got {self.sparsity!r}")
        if self.modify_by != "parameters" and self.modify == "none":
            raise InputError(
                f"modify_by={self.modify_by!r} says by what directions are modified: set modify, or leave it out"
            )

    def require(self, rule: Rule, per_example: bool, perturbation: str) -> None:
        """Raise InputError unless a run with this rule, and evaluated in this way, can leave weights alone by their size."""
        if not self.sparsity:
            return
        if not isinstance(rule, SGD):
            raise InputError(
                f"sparsity leaves weights alone by their size, which the rule {rule.name!r} does not know of: use rule='sgd'"
            )
        if rule.decay_towards == "base":
            raise InputError(
                "sparsity leaves weights alone by their size, and decay_towards='base' moves all of them: leave one of them out"
            )
        if per_example or perturbation in _SIDE_PATHS:
            raise InputError(
                "sparsity is of weights one by one, and a side path multiplies with whole directions: use assignment='shared' and "
                "perturbation='auto', 'scratch' or 'copy', or leave sparsity out"
            )

    def settings(self) -> dict[str, Any]:
        """What the step log's header says of it: what is not default."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    @property
    def measures(self) -> bool:
        """Whether losses are needed to know it."""
        return self.modify != "none" and self.modify_by == "gradients"

    def emphasis(self, tuned: TunedParameters, gradients: Sequence[float] | None = None) -> Emphasis | None:
        """What it is for these tensors, by their present weights, and by :func:`gradient_norms` where it :attr:`measures`.

        Raises:
            InputError: it wants a part of the layers, and there are not so many.
        """
        if not self.settings():
            return None
        parts: dict[str, Any] = {}
        if self.active_layers is not None:
            layers = layers_of(tuned)
            if self.active_layers >= max(layers) + 1:
                raise InputError(
                    f"active_layers={self.active_layers} takes a part of the layers, and {max(layers) + 1} are tuned (numbered in names, as in "
                    "model.layers.7): choose fewer, or leave it out"
                )
            parts = {"layers": layers, "active": self.active_layers}
        if self.sparsity:
            parts["limits"] = limits(tuned, self.sparsity)
        if self.modify != "none" and (gradients or not self.measures):
            lengths = in_units(tuned, gradients or parameter_norms(tuned))
            parts["probed"] = tuple(1 / d for d in lengths)
            parts["moved"] = lengths if self.modify == "variance" else ()
        return Emphasis(**parts)


def layers_of(tuned: TunedParameters) -> tuple[int, ...]:
    """By the id of a tensor, the number of its layer, from 0; -1 outside of layers."""
    found = [_LAYER.match(tensor.name) for tensor in tuned]
    keys = [None if match is None else (match[1], int(match[2])) for match in found]
    numbers = {key: number for number, key in enumerate(sorted({key for key in keys if key is not None}))}
    return tuple(-1 if key is None else numbers[key] for key in keys)


def groups_of(tuned: TunedParameters) -> list[list[int]]:
    """Ids of the tensors that have a d in common: a layer's, or one outside of layers alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for tensor, layer in zip(tuned, layers_of(tuned), strict=True):
        groups.setdefault((layer, tensor.id if layer < 0 else 0), []).append(tensor.id)
    return list(groups.values())


@torch.no_grad()
def limits(tuned: TunedParameters, sparsity: float) -> tuple[float | None, ...]:
    """For every matrix the magnitude that so large a share of its weights exceeds; ties stay below. None for a vector, which is perturbed
    whole. A stored magnitude is taken as it is, so every machine finds the same."""

    def limit(weight: torch.Tensor) -> float | None:
        if weight.ndim < 2 or not weight.numel():
            return None
        kept = max(1, round((1 - sparsity) * weight.numel()))
        return float(weight.detach().abs().reshape(-1).float().cpu().kthvalue(kept).values)

    return tuple(limit(tensor.read()) for tensor in tuned)


@torch.no_grad()
def parameter_norms(tuned: TunedParameters) -> list[float]:
    """Euclidean norms of the tensors of each of :func:`groups_of`."""
    squares = [float(tensor.read().detach().double().square().sum()) for tensor in tuned]
    return [math.sqrt(math.fsum(squares[i] for i in group)) for group in groups_of(tuned)]


@dataclass(frozen=True)
class _OneGroup(Emphasis):
    """Of every group alone, in a step for each."""

    def takes_part(self, seed: int, tensor: int, step: int) -> bool:
        return self.layers[tensor] == step - _STEP


def each_alone(tuned: TunedParameters) -> Emphasis:
    """Directions of every group alone, in the steps in which :func:`gradient_norms` asks for them."""
    group_of = {number: k for k, group in enumerate(groups_of(tuned)) for number in group}
    return _OneGroup(layers=tuple(group_of[tensor.id] for tensor in tuned))


def gradient_norms(
    tuned: TunedParameters, losses: Callable[[int, Sequence[Query]], Sequence[Losses]], eps: float
) -> list[float]:
    """Zeroth-order estimates of the gradients' norms in each of :func:`groups_of`: for directions z that are 0 outside of the group,
    ``E (L(theta + eps z) - L(theta - eps z))^2 / (2 eps)^2 = |g|^2``, here the mean over four of them.

    Args:
        losses: of one minibatch, at queries along the directions of a step with the emphasis :func:`each_alone`.
    """

    def along(group: int, direction: int) -> float:
        (plus,), (minus,) = losses(_STEP + group, [Query(direction, eps), Query(direction, -eps)])
        return (plus - minus) / (2 * eps)

    count = len(groups_of(tuned))
    return [math.sqrt(math.fsum(along(k, i) ** 2 for i in range(_DIRECTIONS)) / _DIRECTIONS) for k in range(count)]


def in_units(tuned: TunedParameters, norms: Sequence[float]) -> tuple[float, ...]:
    """d of every tensor from those of its group, with ``sum_i d_i^-2`` over all weights their number: a perturbation is as long as without
    it. Where a norm is 0, or no number, d is 1."""
    groups = groups_of(tuned)
    numel = {tensor.id: tensor.parameter.numel() for tensor in tuned}
    known = {number: norm for group, norm in zip(groups, norms, strict=True) for number in group if 0 < norm < math.inf}
    count = sum(numel[number] for number in known)
    unit = math.sqrt(math.fsum(numel[i] / d**2 for i, d in known.items()) / count) if count else 1.0
    return tuple(known[tensor.id] * unit if tensor.id in known else 1.0 for tensor in tuned)
