"""L2: what the first step looks at before it trusts an evaluation."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import warn
from ..method.estimators import Query
from .copy import Copy
from .perturbation import Closure, Perturbation, ReadElsewhereError
from .scratch import Scratch


def check(
    perturbation: Perturbation, step: int, query: Query, closure: Closure, *, may_copy: bool
) -> Perturbation | None:
    """Evaluate one point two or three times, and warn of what makes evaluations of a step incomparable.

    Args:
        may_copy: take ``copy`` where ``scratch`` would not be exact.

    Returns:
        The perturbation to be used; None if the loss is not finite, so that nothing can be compared.

    Raises:
        ReadElsewhereError: ``scratch`` would not be exact, and ``may_copy`` is False.
    """
    warn_of_training_mode(perturbation.tuned.module)
    try:
        if isinstance(perturbation, Scratch):
            loss, again = perturbation.check(step, query, closure)
        else:
            loss, again = perturbation.losses(step, [query, query], closure)
    except ReadElsewhereError as error:
        if not may_copy:
            raise ReadElsewhereError(f"{error}: use perturbation='auto' or 'copy'") from error.__cause__
        return copy_instead(perturbation, error)
    if not math.isfinite(loss) or again is None:
        return None
    if again != loss:
        warn(
            f"the closure is not deterministic: it returned {loss!r} and {again!r} at the same point. It must "
            "return the loss of the same minibatch at every call, without dropout",
        )
    return perturbation


def copy_instead(perturbation: Perturbation, error: ReadElsewhereError) -> Copy:
    """``copy``, with a word about why, and what it takes."""
    gib = sum(t.parameter.numel() * t.parameter.element_size() for t in perturbation.tuned) / 2**30
    warn(
        f"{error}, so every step evaluates a perturbed copy of all tuned weights instead (perturbation='copy', {gib:.2f} GiB "
        "more memory)",
    )
    return Copy(perturbation.tuned, perturbation.noise)


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


def refuse_stale_weights() -> None:
    """Raise RuntimeError inside ``parametrize.cached()``, which keeps weights that were computed before."""
    if getattr(torch.nn.utils.parametrize, "_cache_enabled", 0):
        raise RuntimeError(
            "torch.nn.utils.parametrize.cached() keeps weights that were computed before they are perturbed: "
            "leave it out around step(), and inside the closure if you need it"
        )
