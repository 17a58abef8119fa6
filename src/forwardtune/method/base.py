"""The weights that a run began with, towards which weight decay may pull: read a piece at a time, from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from ..names import DECAYS
from ..noise import Update
from ..parameters import TunedTensor

#: ``(lo, hi) -> values`` of one tensor's elements, on the processor or where the tensor is.
ReadBase: TypeAlias = "Callable[[int, int], Tensor]"


class BaseFile:
    """The tensors of a run as it began, in a file: a line, then the bytes of each, row-major, in the order of their ids."""

    def __init__(self, path: str | PathLike[str], tensors: Sequence[TunedTensor]) -> None:
        self._path = path
        with open(path, "rb") as file:
            place = len(file.readline())
        self._places: dict[int, int] = {}
        for tensor in tensors:
            self._places[tensor.id] = place
            place += tensor.parameter.numel() * tensor.parameter.element_size()

    def of(self, tensor: TunedTensor) -> ReadBase:
        """What reads one tensor."""
        dtype, size = tensor.parameter.dtype, tensor.parameter.element_size()

        def read(lo: int, hi: int) -> Tensor:
            values = torch.empty(hi - lo, dtype=dtype, device="cpu")
            room = values.view(torch.uint8).numpy().data
            with open(self._path, "rb") as file:
                file.seek(self._places[tensor.id] + lo * size)
                if file.readinto(room) != len(room):
                    raise InputError(f"{self._path} was cut: resume the run from its base model")
            return values

        return read


def present(tensor: TunedTensor) -> ReadBase:
    """The values that a tensor has now, in a copy."""
    kept = tensor.read().detach().reshape(-1).clone()
    return lambda lo, hi: kept[lo:hi]


def decay(x: Tensor, update: Update, read: ReadBase | None, lo: int, base: Tensor | None) -> Tensor | None:
    """``x <- decay * x``, or with a base ``x <- base + decay * (x - base)``, in place, for elements from ``lo`` on.

    Args:
        base: what an earlier call for these elements returned.

    Returns:
        The base in the numbers of x, where there is one.
    """
    if update.decay == 1.0:
        return base
    if read is None:
        x.mul_(update.decay)
        return None
    if base is None:
        base = read(lo, lo + x.numel()).to(device=x.device, dtype=x.dtype)
    x.sub_(base).mul_(update.decay).add_(base)
    return base


def require_target(name: str) -> str:
    """Raise InputError unless it is one of :data:`~forwardtune.names.DECAYS`."""
    if name not in DECAYS:
        raise InputError(f"unknown decay_towards {name!r}: choose {' or '.join(DECAYS)}")
    return name
