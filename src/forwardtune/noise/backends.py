"""Which code computes the noise of a tensor: the kernels for its device and dtype, or the plain definition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

from ..errors import warn
from . import definition
from .structure import LowRank


@functools.cache
def _on_cpu(dtype: torch.dtype) -> ModuleType | str:
    """The kernels for a processor, or why there are none. Numba is optional, and imported when the first one is needed: it
    costs about as much time as torch."""
    try:
        from . import cpu
    except ImportError:
        return "install numba"
    return cpu if dtype in cpu.DTYPES else f"there is no kernel for {dtype}"


@functools.cache
def _on_cuda(device: torch.device, dtype: torch.dtype) -> ModuleType | str:
    """The kernels for a CUDA device, or why there are none. Triton is imported here, when the first one is needed."""
    try:
        from . import gpu
    except ImportError:
        return "install triton"
    if dtype not in gpu.DTYPES:
        return f"there is no kernel for {dtype}"
    return gpu.trouble(device, dtype) or gpu


def fast(device: torch.device, dtype: torch.dtype) -> ModuleType | str:
    """The compiled code for this device and dtype, or how to get it."""
    if device.type == "cuda":
        return _on_cuda(device, dtype)
    if device.type == "cpu":
        return _on_cpu(dtype)
    return f"there is no kernel for {device.type} yet"


def for_directions(device: torch.device) -> ModuleType:
    """The fastest code for directions themselves, which are float32."""
    chosen = fast(device, torch.float32)
    return definition if isinstance(chosen, str) else chosen


_told = False


def backend(tensor: Tensor) -> ModuleType:
    """The fastest code for this tensor; the plain definition serves whatever has none."""
    chosen = fast(tensor.device, tensor.dtype)
    if not isinstance(chosen, str):
        return chosen
    global _told
    if not _told and tensor.dtype != torch.float64:
        _told = True
        warn(f"forwardtune computes its noise with plain torch here: the same bits, but slowly ({chosen})")
    return definition


def compile_kernels(
    weights: Iterable[Tensor],
    *,
    buffered: bool = False,
    structure: LowRank | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> None:
    """Have the compiled code for these weights ready before the first step, which else compiles it. CPU tensors alone.

    Args:
        buffered: for a rule that needs averages too, and not ``sgd``.
        structure: that of the directions.
        announce: told once, if something is compiled and not read from Numba's cache.
    """
    kinds = {
        (weight.dtype, structure is not None and structure.applies(weight.shape))
        for weight in weights
        if weight.device.type == "cpu" and not isinstance(_on_cpu(weight.dtype), str)
    }
    if kinds:
        from . import cpu

        cpu.compile_kernels(sorted(kinds, key=str), buffered, announce)


def load_kernels(device: torch.device) -> None:
    """Import what computes the noise on this device, which else the first sweep does.

    Where memory is measured it is called before, as libraries are no part of what a step takes.
    """
    fast(device, torch.float32)
