"""L0: what z is, and the sweeps over the weights that use it.

``z = noise(seed, step, probe, tensor, element)`` is a pure function: never stored, never drawn from a global generator,
the same on every device, dtype, shard layout and parameter order. :mod:`.definition` says what it is, in plain torch;
:mod:`.cpu` and :mod:`.gpu` compute the same bits fast. ``docs/noise.md`` is the specification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..errors import warn
from . import definition
from .definition import ROUNDING_PROBE, Count, Update
from .directions import (
    DIRECTIONS,
    GAUSSIAN,
    NOISE_VERSION,
    RADEMACHER,
    SPECIFIED,
    Direction,
    get_direction,
    register_direction,
)
from .philox import split_seed

__all__ = [
    "DIRECTIONS",
    "GAUSSIAN",
    "NOISE_VERSION",
    "RADEMACHER",
    "ROUNDING_PROBE",
    "SPECIFIED",
    "Count",
    "Direction",
    "Noise",
    "Update",
    "compile_kernels",
    "flattened",
    "get_direction",
    "load_kernels",
    "register_direction",
]


@dataclass(frozen=True)
class Noise:
    """The directions of one run: a seed and a distribution.

    Tensors may have any layout; elements are numbered in row-major order. dtypes: float32, bfloat16, float16, float64.
    """

    seed: int
    direction: Direction = GAUSSIAN

    def __post_init__(self) -> None:
        split_seed(self.seed)

    def z(self, like: Tensor, *, tensor: int, step: int, probe: int) -> Tensor:
        """The direction of one tensor: float32, in the shape and on the device of ``like``."""
        gpu = _on_cuda(like.device, torch.float32) if like.device.type == "cuda" else ""
        kernels = definition if isinstance(gpu, str) else gpu
        flat = kernels.directions(self.direction, self.seed, tensor, step, probe, 0, like.numel(), device=like.device)
        return flat.reshape(like.shape)

    def perturb(
        self, out: Tensor, source: Tensor, *, tensor: int, step: int, probe: int, scale: float, start: int = 0
    ) -> None:
        """``out <- source + scale * z``, added in float32, rounded to nearest. ``out`` may be ``source``.

        ``start`` is the index, in the full tensor, of the first element passed: nonzero for a shard.
        """
        flat_out, flat_source = _flat(out), _flat(source)
        _backend(source).perturb(flat_out, flat_source, self.direction, self.seed, tensor, step, probe, scale, start)
        _give_back(out, flat_out)

    def perturb_rows(self, source: Tensor, rows: Tensor, *, tensor: int, step: int, probe: int, scale: float) -> Tensor:
        """Rows ``source[rows] + scale * z[rows]`` of a table, shape ``(*rows.shape, width)``: what an embedding reads."""
        numbers = rows.reshape(-1).to(torch.int64)
        flat = source.index_select(0, numbers)  # copies, and refuses numbers outside the table
        backend = _backend(source)
        if backend is not definition and source.is_contiguous():
            backend.perturb_rows(
                flat, source, numbers.contiguous(), self.direction, self.seed, tensor, step, probe, scale
            )
        else:
            width = source.shape[-1]
            for row, number in zip(flat, numbers.tolist(), strict=True):
                definition.perturb(
                    row, row.clone(), self.direction, self.seed, tensor, step, probe, scale, number * width
                )
        return flat.view(*rows.shape, source.shape[-1])

    def update(self, weight: Tensor, updates: Sequence[Update], *, tensor: int, start: int = 0) -> Count:
        """Apply optimizer steps to ``weight`` in place; half precision is rounded stochastically.

        Returns:
            How many stored values did not change, summed over the steps. It may be a tensor that was not read yet.
        """
        flat = _flat(weight)
        unchanged: Count = _backend(weight).update(flat, updates, self.direction, self.seed, tensor, start)
        _give_back(weight, flat)
        return unchanged

    def store(self, weight: Tensor, x: Tensor, *, tensor: int, step: int, start: int = 0) -> Count:
        """``weight <- round(x)``, rounded as :meth:`update` rounds at that step: what other rules end with.

        Args:
            weight: flat and contiguous, of ``n`` elements.
            x: float32 (float64 for float64 weights), shape ``(n,)``.

        Returns:
            How many stored values did not change. It may be a tensor that was not read yet.
        """
        half = weight.dtype in (torch.bfloat16, torch.float16)
        backend = _backend(weight) if half else definition
        unchanged: Count = backend.store(weight.detach(), x.contiguous(), self.seed, tensor, step, start)
        return unchanged


def compile_kernels(
    weights: Iterable[Tensor], *, buffered: bool = False, announce: Callable[[str], object] = lambda text: None
) -> None:
    """Have the compiled code for these weights ready before the first step, which else compiles it. CPU tensors alone.

    Args:
        buffered: for a rule that needs averages too, and not ``sgd``.
        announce: told once, if something is compiled and not read from Numba's cache.
    """
    dtypes = {weight.dtype for weight in weights if weight.device.type == "cpu"}
    with_kernels = [dtype for dtype in dtypes if not isinstance(_on_cpu(dtype), str)]
    if with_kernels:
        from . import cpu

        cpu.compile_kernels(sorted(with_kernels, key=str), buffered, announce)


def load_kernels(device: torch.device) -> None:
    """Import what computes the noise on this device, which else the first sweep does.

    Where memory is measured it is called before, as libraries are no part of what a step takes.
    """
    _fast(device, torch.float32)


@contextmanager
def flattened(weight: Tensor) -> Iterator[Tensor]:
    """The elements in row-major order, contiguous, to be changed: what is written to them is the weight's afterwards."""
    flat = _flat(weight)
    yield flat
    _give_back(weight, flat)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)


def _give_back(tensor: Tensor, flat: Tensor) -> None:
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))


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


def _fast(device: torch.device, dtype: torch.dtype) -> ModuleType | str:
    """The compiled code for this device and dtype, or how to get it."""
    if device.type == "cuda":
        return _on_cuda(device, dtype)
    if device.type == "cpu":
        return _on_cpu(dtype)
    return f"there is no kernel for {device.type} yet"


_told = False


def _backend(tensor: Tensor) -> ModuleType:
    """The fastest code for this tensor; the plain definition serves whatever has none."""
    fast = _fast(tensor.device, tensor.dtype)
    if not isinstance(fast, str):
        return fast
    global _told
    if not _told and tensor.dtype != torch.float64:
        _told = True
        warn(f"forwardtune computes its noise with plain torch here: the same bits, but slowly ({fast})")
    return definition
