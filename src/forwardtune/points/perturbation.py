"""What every way to evaluate at a perturbed point has in common."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..method.estimators import Losses, Query, groups_of
from ..noise import Noise
from ..parameters import TunedParameters

Closure = Callable[[], "Tensor | float"]


class ReadElsewhereError(RuntimeError):
    """A tuned weight was read on a way that ``scratch`` cannot see, so its perturbation would be missing from the loss.

    Attributes:
        tensors: ids of the tensors that were read so, as far as that was found out.
    """

    tensors: frozenset[int] = frozenset()

    def __init__(self, message: str, tensors: frozenset[int] = frozenset()) -> None:
        super().__init__(message)
        self.tensors = tensors


class Perturbation(ABC):
    """Moves a model to the point of a query and back.

    Use::

        with perturbation:
            perturbation.shift(step, Query(probe, +eps))
            plus = loss()
            perturbation.shift(step, Query(probe, -eps))
            minus = loss()

    Attributes:
        used: ids of the tuned tensors that were read inside the last block, and which rows of some; None where that cannot be seen.
    """

    name: str

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        self.tuned = tuned
        self.noise = noise
        self.used: set[int] | None = None

    def losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        """The closure's values at the queried points, in their order: of the minibatch, or of its examples.

        Raises:
            TypeError: the closure returned something else.
        """
        with self:
            return self._losses(step, queries, closure)

    def _losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        values = []
        for query in queries:
            self.shift(step, query)
            values.append(as_losses(closure()) if query.per_example else as_loss(closure()))
        return [read(value) for value in values]  # now: a GPU went from point to point without waiting

    def check(self, step: int, query: Query, closure: Closure) -> tuple[Losses, Losses | None]:
        """Evaluate one point twice, in the ways that are said to be the same.

        Returns:
            The losses of both. The second are None when the first are not finite: then there is nothing to compare.

        Raises:
            ReadElsewhereError: the weights are read on a way that this perturbation cannot see.
        """
        losses, again = self.losses(step, [query, query], closure)
        return losses, again

    @abstractmethod
    def shift(self, step: int, query: Query) -> None:
        """Evaluate at the query's point from now on; theta is always the unperturbed point.

        Scale 0 is theta itself, and costs no noise.
        """

    @abstractmethod
    def __enter__(self) -> Perturbation: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...


def as_loss(value: Any) -> Tensor | float:
    """What a closure returned, once it is known to be a number. A tensor is not read yet but copied: the next evaluation may
    write to it.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure returned a tensor of shape {tuple(value.shape)}: return one number, a mean")
        return value.detach().clone()
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"the closure returned {value!r}, which is not a number: return the loss") from None


def as_losses(value: Any) -> Tensor:
    """What a closure returned, once it is known to be a loss for each example: a tensor of shape (examples,), not read yet.

    Raises:
        TypeError: it is something else.
    """
    try:
        losses = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        if losses.ndim != 1 or not losses.numel():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(
            f"the closure returned {what}, and every example has a direction of its own: return their losses, shape (examples,)"
        ) from None
    return losses


def grouped(losses: Tensor, size: int) -> Tensor:
    """The losses of groups of examples, one after the other, shape (groups,): sums times groups over examples, so the mean stays."""
    count, groups = len(losses), groups_of(len(losses), size)
    if groups == count:
        return losses
    losses = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
    of = (
        torch.arange(count, device=losses.device) * groups // count
        == torch.arange(groups, device=losses.device)[:, None]
    )
    return torch.where(of, losses, 0).sum(1) * (groups / count)


def read(value: Tensor | float) -> Losses:
    """The numbers of a loss, or of several."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return (float(value),)
    return tuple(value.double().tolist())


def without_compilation() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly inside: compiled code would not see that its weights are others for a while.

    torch._dynamo is costly to import, and where nothing imported it nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
