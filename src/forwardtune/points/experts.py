"""L1: the weights of experts that one tensor holds: perturbed as far as tokens are routed to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import TunedTensor
from .lazy import StandIn


def of_experts(module: nn.Module, owned: Mapping[str, TunedTensor]) -> frozenset[str]:
    """The names of the parameters that hold a slice for every expert: those of three dimensions, and what is as long beside them."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return frozenset()
    stacks = {tensor.parameter.shape[0] for tensor in owned.values() if tensor.parameter.ndim == 3}
    return frozenset(
        name
        for name, tensor in owned.items()
        if tensor.parameter.ndim in (2, 3) and tensor.parameter.shape[0] in stacks
    )


class ExpertWeight(StandIn):
    """Stands for a tensor whose first dimension counts experts.

    ``weight[numbers]`` and grouped products (``grouped_mm``), also of its transpose, compute the slices that they need; any other use
    computes all of them. The slices lie where they would lie in the whole.
    """

    _state: ExpertSlices
    _transposed: tuple[int, int] | None

    @classmethod
    def of(cls, original: Tensor, state: ExpertSlices, transposed: tuple[int, int] | None = None) -> ExpertWeight:
        """A stand-in for ``original``, whose slices these are; with two dimensions exchanged, for what comes of that."""
        weight = cls._of(original)
        weight._state, weight._transposed = state, transposed
        return weight

    def _computed(self) -> Tensor:
        self._state.every()
        return self._dense()

    @classmethod
    def _in_part(cls, func: Any, args: Any, kwargs: Any) -> Any:
        weight = args[0] if args and isinstance(args[0], cls) else None
        if weight is not None and weight.ndim == 3 and func in TRANSPOSES and weight._transposed is None:
            dims = exchanged(func, args, kwargs)
            if dims is not None:
                return cls.of(weight._original.transpose(*dims), weight._state, dims)
        if weight is not None and func is Tensor.__getitem__ and weight._transposed is None:
            numbers = picked(args[1], weight._state.out)
            if numbers is not None:
                return weight._state.some(numbers)[args[1]]
        if is_grouped(func) and len(args) > 1 and isinstance(args[1], cls) and isinstance(kwargs.get("offs"), Tensor):
            sizes = torch.diff(kwargs["offs"], prepend=kwargs["offs"].new_zeros(1))
            args[1]._state.some(sizes.nonzero().view(-1))
            return func(args[0], args[1]._dense(), *args[2:], **kwargs)
        return NotImplemented

    def _dense(self) -> Tensor:
        out = self._state.out
        return out if self._transposed is None else out.transpose(*self._transposed)


class ExpertSlices:
    """The slices of a tensor, computed once each.

    Args:
        out: where the perturbed slices go, of the same shape.
        perturb: computes the slices from one number to another.
        note_use: called when all of them are used; ``note_rows`` with the numbers of those that are.
    """

    def __init__(
        self,
        out: Tensor,
        perturb: Callable[[int, int], None],
        note_use: Callable[[], None],
        note_rows: Callable[[Tensor], None],
    ) -> None:
        self.out, self._perturb, self._note_use, self._note_rows = out, perturb, note_use, note_rows
        self._done = [False] * len(out)

    def some(self, numbers: Tensor) -> Tensor:
        """The tensor, in which the slices of these numbers are computed."""
        self._note_rows(numbers)
        self._compute({number % len(self._done) for number in numbers.reshape(-1).tolist()})
        return self.out

    def every(self) -> None:
        """All slices are computed."""
        self._note_use()
        self._compute(set(range(len(self._done))))

    def _compute(self, numbers: set[int]) -> None:
        missing = sorted(number for number in numbers if not self._done[number])
        first = 0
        for i, number in enumerate(missing):
            self._done[number] = True
            if i + 1 == len(missing) or missing[i + 1] != number + 1:  # one sweep for those that follow each other
                self._perturb(missing[first], number + 1)
                first = i + 1


TRANSPOSES = {Tensor.transpose, torch.transpose, Tensor.mT.__get__}  # type: ignore[attr-defined]


def exchanged(func: Any, args: Any, kwargs: Any) -> tuple[int, int] | None:
    """Which two dimensions are exchanged, if the first one stays."""
    if func is Tensor.mT.__get__:  # type: ignore[attr-defined]
        return (1, 2)
    if kwargs or len(args) != 3:
        return None
    dims = (args[1] % 3, args[2] % 3)
    return None if 0 in dims else dims


def picked(index: Any, out: Tensor) -> Tensor | None:
    """The numbers of the slices that an index of the first dimension picks; None for an index of another kind."""
    if isinstance(index, int) and not isinstance(index, bool):
        return torch.tensor([index], device=out.device) if -len(out) <= index < len(out) else None
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        return index
    return None


def is_grouped(func: Any) -> bool:
    return func is getattr(F, "grouped_mm", None) or "grouped_mm" in getattr(func, "__name__", "")
