"""A CPU on which several tensors share a launch, as they do on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from forwardtune import noise
from forwardtune.noise import cpu

Launches = list[int]  # of each that was for several tensors, how many


@contextmanager
def sharing() -> Iterator[Launches]:
    """Inside, a sweep over several tensors of a CPU counts as one launch."""
    launches: Launches = []

    def perturber(
        outs: Sequence[Tensor], sources: Sequence[Tensor], direction: Any, seed: int, tensors: Sequence[int]
    ) -> Any:
        places = [
            (source.data_ptr(), source.nbytes, source.dtype) for source in sources
        ]  # as a kernel, it keeps nothing alive

        def perturb(step: int, probe: int, scale: float) -> None:
            launches.append(len(outs))
            for out, (address, size, dtype), tensor in zip(outs, places, tensors, strict=True):
                source = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
                cpu.perturb(out, source, direction, seed, tensor, step, probe, scale)

        return perturb

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "fits", lambda tensor: tensor.is_contiguous(), raising=False)
        patch.setattr(cpu, "perturber", perturber, raising=False)
        patch.setattr(noise.Noise, "update_many", one_by_one)
        yield launches


def one_by_one(self: noise.Noise, weights: Sequence[Tensor], updates: Any, *, tensors: Sequence[int]) -> Any:
    return sum(self.update(weight, updates, tensor=i) for weight, i in zip(weights, tensors, strict=True))
