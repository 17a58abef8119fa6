"""L1: finds the tuned tensors that a model reads past the perturbed copies that it is lent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# So many evaluations may look for the tensors that no operation shows.
TRIALS = 64


class Leaks(TorchDispatchMode):
    """Inside, every operation's tensors are looked at. Scripted code's, and those of kernels that are called past torch, are not seen.

    Args:
        whose: the id of the tuned tensor that lies where a tensor lies, if nobody may read it there; else None.

    Attributes:
        found: the ids that came up.
    """

    def __init__(self, whose: Callable[[Tensor], int | None]) -> None:
        super().__init__()
        self._whose = whose
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and (number := self._whose(value)) is not None:
                self.found.add(number)
        return func(*args, **kwargs)


def storage_of(tensor: Tensor) -> int | None:
    """The address of its storage; None if it has none, or a part of it is elsewhere."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def among(numbers: Sequence[int], is_bad: Callable[[Sequence[int]], bool]) -> frozenset[int]:
    """Those of the numbers that make a set bad that holds them, by halving; none where that takes too many trials."""
    found: set[int] = set()
    sets, trials = [numbers], 0
    while sets:
        one = sets.pop()
        if not one:
            continue
        if trials == TRIALS:
            return frozenset()
        trials += 1
        if not is_bad(one):
            continue
        if len(one) == 1:
            found.update(one)
        else:
            sets += [one[: len(one) // 2], one[len(one) // 2 :]]
    return frozenset(found)
