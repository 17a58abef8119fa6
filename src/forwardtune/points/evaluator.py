"""L2: the losses at the points of a step: the model is moved there in a way that was found to be exact at the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..errors import InputError, warn
from ..method.estimators import Losses, Query
from ..method.pending import Pending, about_to_read
from ..noise import Noise
from ..parameters import TunedParameters
from ..storage import Offloaded
from .both_signs import BothSigns
from .copy import Copy
from .idle import summary
from .perturbation import Closure, Perturbation, ReadElsewhereError
from .scratch import Scratch
from .side_path import SidePath

Result = TypeVar("Result")

PERTURBATIONS: dict[str, type[Perturbation]] = {cls.name: cls for cls in (Scratch, Copy, SidePath, BothSigns)}


class Evaluator:
    """Evaluates a closure at the points of queries.

    Args:
        tuned, noise: the weights and their directions.
        perturbation: the name of one, or ``"auto"``: the side path where every example has a direction of its own, else scratch, or
            copy without a module or where a weight is read on a way that scratch cannot see.
        per_example: whether every example has a direction of its own.
        pending: steps that are not in the weights yet.
        probes_per_pass: so many probes share a forward pass, where both sides do.

    Attributes:
        perturbation: how the model is moved; None until that is known.
        checking: True while the self-check calls the closure.

    Raises:
        ValueError: an unknown perturbation, or one that cannot do what is wanted.
    """

    def __init__(
        self,
        tuned: TunedParameters,
        noise: Noise,
        perturbation: str,
        *,
        per_example: bool,
        pending: Pending | None = None,
        probes_per_pass: int = 1,
    ) -> None:
        if perturbation not in {"auto", *PERTURBATIONS}:
            raise InputError(f"unknown perturbation {perturbation!r}: choose auto, {', '.join(PERTURBATIONS)}")
        if per_example and perturbation not in ("auto", SidePath.name, BothSigns.name):
            raise InputError(
                f"perturbation={perturbation!r} moves the weights for the whole minibatch, and with assignment='example' every example has "
                "a direction of its own: use perturbation='auto', 'side_path' or 'both_signs'"
            )
        if perturbation == BothSigns.name and not per_example:
            raise InputError(
                "perturbation='both_signs' is of directions of examples: set assignment='example', or perturbation='side_path'"
            )
        if not (isinstance(probes_per_pass, int) and probes_per_pass >= 1):
            raise InputError(
                f"probes_per_pass must be an integer of at least 1, got {probes_per_pass!r}", "probes_per_pass"
            )
        if probes_per_pass > 1 and perturbation != BothSigns.name:
            raise InputError(
                "probes_per_pass puts the rows of several probes of examples into one pass: set perturbation='both_signs', with one worker",
                "probes_per_pass",
            )
        self._tuned, self._noise, self._pending = tuned, noise, pending
        self.probes_per_pass = probes_per_pass
        is_offloaded = any(isinstance(tensor.home, Offloaded) for tensor in tuned)
        if is_offloaded and (perturbation == Copy.name or tuned.module is None):
            raise InputError(
                "perturbation='copy' has a second set of all tuned weights in memory, which offload is to save: use perturbation='auto', "
                "and pass the module to MeZO"
            )
        self._may_copy = perturbation == "auto" and not per_example and not is_offloaded
        if per_example and perturbation == "auto":
            perturbation = SidePath.name
        elif perturbation == "auto" and tuned.module is None:
            perturbation = Copy.name
        self._name = Scratch.name if perturbation == "auto" else perturbation
        self.perturbation: Perturbation | None = None if perturbation == "auto" else self._made()
        self.checking = False
        self._checked: set[bool] = set()  # whether points were of each example, of those that were compared

    def _made(self) -> Perturbation:
        made = PERTURBATIONS[self._name](self._tuned, self._noise)
        if isinstance(made, SidePath):
            made.point.waiting.pending = self._pending
        if isinstance(made, BothSigns):
            made.probes = self.probes_per_pass
        return made

    def losses(self, step: int, queries: Sequence[Query], closure: Closure) -> tuple[list[Losses], set[int]]:
        """The closure's values at the queried points, and the ids of the tuned tensors that it read.

        The first call evaluates the closure a few times more, to see that evaluations can be trusted.

        Raises:
            TypeError: the closure returned no number, or not one for each example.
            ReadElsewhereError: ``scratch`` was asked for, or a side path is needed, and would not be exact.
        """
        if getattr(torch.nn.utils.parametrize, "_cache_enabled", 0):
            raise RuntimeError(
                "torch.nn.utils.parametrize.cached() keeps weights that were computed before they are perturbed: "
                "leave it out around step(), and inside the closure if you need it"
            )
        perturbation = self.prepare(step, queries, closure)
        try:
            losses = self._with_copies(perturbation, lambda: perturbation.losses(step, queries, closure))
        except ReadElsewhereError as error:
            perturbation = self._otherwise(error)
            losses = perturbation.losses(step, queries, closure)
        used = perturbation.used
        return losses, set(range(len(self._tuned))) if used is None else used

    def prepare(self, step: int, queries: Sequence[Query], closure: Closure) -> Perturbation:
        """How the weights will be perturbed; the first call makes sure of it at one of the points, and warns of what makes
        evaluations of a step incomparable."""
        about_to_read(self._tuned)
        perturbation = self.perturbation or self._made()
        query = next((query for query in queries if query.scale), None)
        if query is None or query.per_example in self._checked:  # another worker has those that move the weights
            return perturbation
        warn_of_training_mode(self._tuned.module)
        self.checking = True
        try:
            losses, again = self._with_copies(perturbation, lambda: perturbation.check(step, query, closure))
        except ReadElsewhereError as error:
            perturbation = self._otherwise(error)
            self._checked.add(query.per_example)
            return perturbation
        finally:
            self.checking = False
        if again is None or not all(map(math.isfinite, losses)):
            return perturbation  # the loss is not finite, there is nothing to compare: ask again at the next step
        self.perturbation = perturbation
        self._checked.add(query.per_example)
        if again != losses:
            shown = (losses, again) if query.per_example else (losses[0], again[0])
            warn(
                f"the closure is not deterministic: it returned {shown[0]!r} and {shown[1]!r} at the same point. It must "
                "return the loss of the same minibatch at every call, without dropout",
            )
        return perturbation

    def _with_copies(self, perturbation: Perturbation, evaluate: Callable[[], Result]) -> Result:
        """What ``evaluate`` gives. Tensors that turn out to be read where ``scratch`` cannot see it are perturbed as a whole from then on,
        they alone; that is said, with what it takes.

        Raises:
            ReadElsewhereError: it cannot be found out which they are.
        """
        new: frozenset[int] = frozenset()
        while True:
            try:
                result = evaluate()
                break
            except ReadElsewhereError as error:
                if not isinstance(perturbation, Scratch) or error.tensors <= new:
                    raise
                perturbation.copy_whole(error.tensors)
                new, why = new | error.tensors, str(error)
        if new:
            self.perturbation = perturbation
            numel = sum(self._tuned[i].parameter.numel() for i in new)
            warn(
                f"{why}: {summary(self._tuned, sorted(new))}. So every step evaluates a perturbed copy of {len(new)} of "
                f"{len(self._tuned)} tuned tensors as a whole ({numel:,} of {self._tuned.numel:,} weights in more memory)"
            )
        return result

    def _otherwise(self, error: ReadElsewhereError) -> Perturbation:
        """``copy`` where that is allowed, with a word about why, and what it takes."""
        if isinstance(error, InputError):  # says itself what to do
            raise error
        if any(isinstance(tensor.home, Offloaded) for tensor in self._tuned):
            raise ReadElsewhereError(
                f"{error}, and offloaded weights cannot be copied as a whole: leave offload out, or tune an adapter"
            ) from error.__cause__
        if not self._may_copy:
            raise ReadElsewhereError(f"{error}: use perturbation='auto' or 'copy'") from error.__cause__
        gib = sum(t.parameter.numel() * t.parameter.element_size() for t in self._tuned) / 2**30
        warn(
            f"{error}, so every step evaluates a perturbed copy of all tuned weights instead (perturbation='copy', {gib:.2f} GiB "
            "more memory)",
        )
        self._name = Copy.name
        self.perturbation = self._made()
        return self.perturbation

    @property
    def copied(self) -> frozenset[int]:
        """The ids of the tuned tensors that are read outside the modules which own them, as far as is known: each is perturbed as a
        whole, in memory of its own."""
        return self.perturbation.copied if isinstance(self.perturbation, Scratch) else frozenset()

    @property
    def left_out(self) -> frozenset[int]:
        """The ids of the tuned tensors that have no side path, as far as is known."""
        return frozenset(self.perturbation.left_out) if isinstance(self.perturbation, SidePath) else frozenset()

    def leave_out(self, tensors: Iterable[int]) -> None:
        """These tensors, by id, have no side path."""
        if isinstance(self.perturbation, SidePath):
            self.perturbation.left_out.update(tensors)

    def forgotten(self, pending: Pending | None = None) -> Evaluator:
        """One like it at its beginning, without scratch memory; what has no side path is known."""
        fresh = Evaluator.__new__(Evaluator)
        fresh.__dict__.update(self.__dict__, _checked=set(), _pending=pending)
        fresh.perturbation = None if self._may_copy or self.perturbation is None else fresh._made()
        fresh.leave_out(self.left_out)
        return fresh


def warn_of_training_mode(module: nn.Module | None) -> None:
    """Dropout differs between the evaluations of a step; normalisation by batch keeps statistics of perturbed activations."""
    modules = list(module.modules()) if module is not None else []
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules):
        warn(
            "the model is in training mode with dropout, which differs between the evaluations of a step: "
            "call model.eval() before step()",
        )
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.training and m.track_running_stats for m in modules):
        warn(
            "the model is in training mode with batch normalisation, whose running statistics every evaluation at perturbed "
            "weights would move: call model.eval() before step()",
        )
