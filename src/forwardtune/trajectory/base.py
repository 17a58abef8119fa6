"""The weights that a run began with, in a file: the way back to any of its steps, at no cost in memory."""

from __future__ import annotations

import os
import shutil
from os import PathLike
from pathlib import Path

import torch

from ..errors import InputError
from ..optimizer import MeZO
from ..parameters import TunedParameters
from ..rules import History
from .reader import read_log
from .replay import apply_updates, require_base
from .updates import trajectory_of


class BaseWeights:
    """A copy of the tuned weights on disk, as they are now. A file that is there already is used as it is.

    The file holds the bytes of the tensors in the order of ``tuned``, and nothing else: it belongs to one run.

    Args:
        path: the file.
        tuned: what to keep.

    Raises:
        InputError: the disk has no room for them.
    """

    def __init__(self, path: str | PathLike[str], tuned: TunedParameters) -> None:
        self.path = Path(path)
        self._tuned = tuned
        if not self.path.exists():
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # what a kill left takes no room
        needed = sum(t.parameter.numel() * t.parameter.element_size() for t in self._tuned)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise InputError(
                f"a run that finds its own learning rate keeps the weights that it began with on disk: {needed / 2**30:.1f} GiB "
                f"in {self.path.parent}, where {free / 2**30:.1f} are free. Make room, or give a learning rate"
            )
        with open(partial, "wb") as file:
            for tensor in self._tuned:
                file.write(_bytes(tensor.parameter.detach().cpu().contiguous()))
        os.replace(partial, self.path)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tuned weights the values in the file, one tensor after another.

        They are read into the weights themselves, or into a copy of one tensor where those lie elsewhere: a file that is mapped
        would count as memory of the process.

        Raises:
            InputError: the file was cut.
        """
        with open(self.path, "rb") as file:
            for tensor in self._tuned:
                weight = tensor.parameter.detach()
                direct = weight.device.type == "cpu" and weight.is_contiguous()
                target = weight if direct else torch.empty(weight.shape, dtype=weight.dtype)
                room = _bytes(target)
                if file.readinto(room) != len(room):
                    raise InputError(f"{self.path} is damaged: start the run again in another folder")
                if not direct:
                    weight.copy_(target)

    def go_back(self, optimizer: MeZO, log: str | PathLike[str], steps: int) -> None:
        """Bring an optimizer that writes this log back to the weights, and the rule's memory, after so many of its steps.

        Raises:
            LogError: the log is damaged, or the file holds other weights than those that its run began with.
        """
        trajectory = trajectory_of(read_log(log))
        optimizer.moving()
        self.restore()
        require_base(trajectory, self._tuned)
        history: History = apply_updates(trajectory, self._tuned, trajectory.first(steps), None, keep=True)
        optimizer.moved_back(history)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the processor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
