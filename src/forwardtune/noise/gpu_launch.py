"""What a launch of a kernel takes, prepared on the host: tiles, tables, plans of steps, words.

What the host prepares is kept, as all tensors of a step share it, and copied without waiting for the device. It
belongs to the stream that copied it. Numbers are also told apart by their text, because 0.0 and -0.0 are equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import devices
from .definition import Update
from .directions import Direction
from .philox import split_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Perturbing takes two Philox blocks a thread and still 32 registers, which every warp of a multiprocessor can have. An
# update, which rounds and counts, takes one block. Widths of embeddings are small multiples of 1,024.
TILE, WARPS = 2048, 4
ROW_TILE, ROW_WARPS = 1024, 2
UPDATE_TILE, UPDATE_WARPS = 1024, 4
# Terms fused into one sweep: their tables, 16 KiB each, should leave half of the smallest first-level caches free.
FUSED_TERMS = 4


@functools.lru_cache(maxsize=32)
def plan(updates: tuple[Update, ...], text: str, device: torch.device, stream: int) -> Tensor:
    """The steps' numbers, where the terms of each begin and where the last ones end, the decays, then each term's probe."""
    decays = torch.tensor([item.decay for item in updates], dtype=torch.float32, device="cpu").view(torch.int32)
    plan = [
        *(signed(item.step) for item in updates),
        *itertools.accumulate((len(item.terms) for item in updates), initial=0),
        *decays.tolist(),
        *(signed(probe) for item in updates for probe, _ in item.terms),
    ]
    return sent(plan, torch.int32, device)


@functools.lru_cache(maxsize=32)
def tables(direction: Direction, scales: tuple[str, ...], device: torch.device, stream: int) -> Tensor:
    """``direction.table(scale)`` for each scale, computed on the device: shape ``(len(scales), entries)``."""
    factors = sent([float(scale) for scale in scales], torch.float64, device)
    return (values(direction, torch.float64, device, stream) * factors.unsqueeze(1)).float()


@functools.lru_cache(maxsize=32)
def values(direction: Direction, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return sent(direction.values.tolist(), dtype, device)


@functools.lru_cache(maxsize=256)
def kept(numbers: tuple[float, ...], text: str, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return sent(numbers, dtype, device)


def sent(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return devices.sent(torch.tensor(numbers, dtype=dtype, device="cpu"), device)  # whatever the default device is


def sweeps(updates: Sequence[Update]) -> list[tuple[Update, ...]]:
    """Consecutive steps with at most ``FUSED_TERMS`` terms together; a step is never cut."""
    sweeps: list[list[Update]] = []
    terms = 0
    for item in updates:
        more = len(item.terms)
        if not sweeps or terms + max(1, more) > FUSED_TERMS:
            sweeps.append([])
            terms = 0
        sweeps[-1].append(item)
        terms += max(1, more)
    return [tuple(sweep) for sweep in sweeps]


def stored(tensor: Tensor) -> Tensor:
    """The storage in the type that selects the conversions."""
    return tensor.detach().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.detach()


def signed(word: int) -> int:
    """A 32-bit word as the signed integer with its bits: Triton would compile another kernel for each wider type."""
    return word - 2**32 if word >= 2**31 else word


def key(seed: int) -> tuple[int, int]:
    k0, k1 = split_seed(seed)
    return signed(k0), signed(k1)


def options(tile: int, warps: int) -> dict[str, Any]:
    # A fused multiply-add rounds once where the definition rounds twice.
    return {"size": tile, "num_warps": warps, "enable_fp_fusion": False}


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
