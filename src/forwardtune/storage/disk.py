"""Values in a file that is mapped: the system brings its pages into memory as they are read, and takes them out where memory is short."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .offloaded import Offloaded

# Tensors begin as torch's own do in memory: matrix libraries choose kernels, and so roundings, by the alignment.
_ALIGNMENT = 64


class OnDisk(Offloaded):
    """Values in a private file in a folder, mapped into memory.

    The file is a copy, and has no name: the system gives its room back when the model is gone or the process has ended, however it
    ended. All of its room is taken before the first value is written, so that a disk that fills up later stops no update. What is read is
    page cache, of which the system takes back what it needs; the process itself holds no weights.

    Args:
        folder: where the file lies, on a disk that has room for the model. It is made if it is not there.
        device: where the model computes.

    Raises:
        InputError: from :meth:`place`, when the disk has no room.
    """

    name = "disk"

    def __init__(self, folder: str | PathLike[str], device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        self.folder = Path(folder)

    def _rooms(self, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
        if not parameters:
            return
        sizes = [p.nbytes for p in parameters]
        places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        memory = self._file(sum(places))
        offset = 0
        for parameter, place in zip(parameters, places, strict=True):
            # Each has a storage of its own: whoever saves the model takes weights in one storage for tied ones.
            flat = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
            yield flat.as_strided(parameter.shape, _strides(parameter))
            offset += place

    def _file(self, size: int) -> mmap.mmap:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise InputError(self._no_room(size, f"{free / 2**30:.1f} are free"), "offload")
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _take(file.fileno(), size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise InputError(self._no_room(size, error.strerror or str(error)), "offload") from None

    def _no_room(self, size: int, why: str) -> str:
        return f"weights on disk take {size / 2**30:.1f} GiB in {self.folder} ({why}): make room, or choose a folder on another disk"


def _take(file: int, size: int) -> None:
    """Take room for a whole file. Without it, the process would be killed at the first page for which there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(1 << 20)
    for _ in range(-(-size // len(zeros))):
        os.write(file, zeros)
    os.truncate(file, size)


def _strides(parameter: Tensor) -> Sequence[int]:
    """A parameter's own, where they leave no gaps; else row-major ones."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if extent == parameter.numel():
        return parameter.stride()
    return [math.prod(parameter.shape[i + 1 :]) for i in range(parameter.ndim)]
