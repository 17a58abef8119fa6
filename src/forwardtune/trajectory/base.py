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

    Args:
        path: a ``.pt`` file.
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
        # torch writes one tensor after another; safetensors would copy all of them first.
        torch.save({t.name: t.parameter.detach() for t in self._tuned}, partial)
        os.replace(partial, self.path)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tuned weights the values in the file, one tensor after another."""
        kept = torch.load(self.path, mmap=True, map_location="cpu", weights_only=True)
        for tensor in self._tuned:
            tensor.parameter.copy_(kept[tensor.name])

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
