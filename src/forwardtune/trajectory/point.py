"""The weights that a run goes back to, in a file: a way back at no cost in memory, on which no step is replayed twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import InputError, LogError
from ..method.moments import Elementwise
from ..method.record import StepRecord
from ..method.rule import History, Rule, move_all
from ..noise import Update
from ..optimizer import MeZO
from ..parameters import TunedParameters
from .reader import Log
from .replay import require_base
from .updates import standing, trajectory_of, updates_by_group


class ReturnPoint:
    """The tuned weights and the rule's memory after some step of a run, on disk, and the steps taken since then.

    Going back to step n reads them, replays the steps in between, and keeps what comes of it as the new point. So all ways back
    of a run together replay each of its steps once at most, and the log is not read.

    The file holds a line of JSON (the digest of the weights that the run began with, the number of steps, the number of
    moments a tensor), then the bytes of the tuned tensors in the order of ``optimizer.tuned``, then those of the moments of a
    rule with ``state="exact"``.

    Args:
        path: the file. It is written, in the place of one that is there.
        optimizer: whose weights are kept as they are now. Its steps are listened to from now on.
        base: digest of the weights that the run began with.

    Attributes:
        steps: the point is the weights after so many steps.

    Raises:
        InputError: the disk has no room for them.
    """

    def __init__(self, path: str | PathLike[str], optimizer: MeZO, base: str) -> None:
        self.path, self._optimizer, self._base = Path(path), optimizer, base
        optimizer.fold()
        self._keep(optimizer.next_step - len(optimizer.held or ()))
        self._listen([])

    @classmethod
    def resume(cls, path: str | PathLike[str], optimizer: MeZO, log: Log) -> ReturnPoint:
        """The point that a run left, with the steps of its log since then.

        Raises:
            LogError: there is none, or it is of another run, or of steps that were undone.
        """
        self = cls.__new__(cls)
        self.path, self._optimizer, self._base = Path(path), optimizer, log.header["base"]
        steps = _steps_in(self.path, log)
        if steps is None:
            raise LogError(f"{self.path} is no point of the run in {log.path}: start from the run's own base model")
        stands = standing(log.rollbacks, log.steps)
        self.steps = steps
        self._history = _memory(optimizer.rule, trajectory_of(log).first(steps)[0])
        self._listen([record for record in log.records[steps:] if stands[record.step]])
        return self

    def _listen(self, since: list[StepRecord]) -> None:
        self._since = since
        self._optimizer.recorders.append(since.append)

    def _keep(self, steps: int) -> None:
        """Make the optimizer's present weights the point, as those after so many steps."""
        history = self._optimizer.history
        self.steps, self._history = steps, history.without_moments()
        _write(self.path, self._optimizer, {"base": self._base, "steps": steps})

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tuned weights the values in the file. What the rule remembers stays.

        Raises:
            InputError: the file was cut.
        """
        self._read(None)

    @torch.no_grad()
    def go_back(self, steps: int) -> None:
        """Bring the optimizer to the weights, and the rule's memory, after so many of its steps.

        Raises:
            ValueError: neither the point nor a step since then.
            InputError: the file was cut.
        """
        optimizer = self._optimizer
        again = [record for record in self._since if record.step < steps]
        if steps != self.steps and (not again or again[-1].step != steps - 1):
            raise ValueError(
                f"there is no way back to step {steps}: only to step {self.steps}, or to one taken since then"
            )
        history = self._history.without_moments()
        optimizer.interrupted = True
        self._read(history)
        updates = updates_by_group(optimizer.rule, again, len(optimizer.param_groups))
        folded_at = None if optimizer.pending is None else optimizer.pending.at
        move_all(optimizer.rule, optimizer.noise, optimizer.tuned, updates, history, folded_at=folded_at)
        if optimizer.pending is not None:
            optimizer.pending.forget()
        optimizer.history, optimizer.interrupted = history, False
        self._since.clear()
        if again:
            self._keep(steps)

    def _read(self, history: History | None) -> None:
        """Read the weights, and into the history the moments, which take the place of the optimizer's."""
        tuned = self._optimizer.tuned
        with open(self.path, "rb") as file:
            header = json.loads(file.readline())
            _fill(self.path, file, [tensor.parameter.detach() for tensor in tuned])
            if history is not None and header["moments"]:
                history.moments = self._optimizer.history.moments
                _fill(self.path, file, [moment for tensor in tuned for moment in history.moments[tensor.name]])

    def remove(self) -> None:
        """Delete the file, and listen no more."""
        self.path.unlink(missing_ok=True)
        recorders = self._optimizer.recorders
        recorders[:] = [recorder for recorder in recorders if recorder != self._since.append]


def keep_point(path: str | PathLike[str], optimizer: MeZO, log: Log) -> None:
    """See to it that a run which is resumed has a point: the one that it left, else the weights that it began with.

    Raises:
        LogError: it left none that fits, and the optimizer does not hold those weights.
        InputError: the disk has no room for them.
    """
    if _steps_in(Path(path), log) is None:
        require_base(trajectory_of(log), optimizer.tuned)
        require_room(path, optimizer)
        _write(Path(path), optimizer, {"base": log.header["base"], "steps": 0})


def keep_base(path: str | PathLike[str], optimizer: MeZO, base: str | None = None) -> None:
    """Keep the optimizer's weights, which are those that a run begins with, in a file, and let weight decay read them there.

    Needed before the first step, or before a log is resumed, by rules with ``decay_towards="base"``.

    Args:
        base: their digest, if it is known.

    Raises:
        InputError: the disk has no room for them.
    """
    require_room(
        path,
        optimizer,
        why="leaves an average, or decays weights towards those that it began with, keeps those",
        remedy="do without both",
    )
    _write(Path(path), optimizer, {"base": base or optimizer.tuned.digest(), "steps": 0})
    optimizer.tuned.base = Path(path)


@torch.no_grad()
def restore(path: str | PathLike[str], tuned: TunedParameters) -> None:
    """Give tuned tensors the values that they have in a file. Raises InputError if it was cut."""
    with open(path, "rb") as file:
        file.readline()
        _fill(Path(path), file, [tensor.parameter.detach() for tensor in tuned])


def require_room(
    path: str | PathLike[str],
    optimizer: MeZO,
    *,
    why: str = "finds its own learning rate keeps the weights that it may go back to",
    remedy: str = "give a learning rate",
) -> None:
    """Raise InputError unless the disk has room for a point."""
    rule, folder = optimizer.rule, Path(path).parent
    needed = sum(t.parameter.nbytes for t in optimizer.tuned)
    if isinstance(rule, Elementwise) and rule.state == "exact":
        needed += 4 * rule.averages * optimizer.tuned.numel
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"a run that {why} on disk: {needed / 2**30:.1f} GiB "
            f"in {folder}, where {free / 2**30:.1f} are free. Make room, or {remedy}"
        )


def _steps_in(path: Path, log: Log) -> int | None:
    """The steps of the point in a file; None if it is not one of the log's run, or does not stand there."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
        base, steps = header["base"], header["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if base != log.header["base"] or steps > log.steps:
        return None
    fits = standing(log.rollbacks, steps) == standing(log.rollbacks, log.steps)[:steps]
    return int(steps) if fits else None


def _memory(rule: Rule, updates: Sequence[Update]) -> History:
    """What a rule remembers of these steps, without its moments."""
    history = History()
    if rule.remembers:
        history.take([update for update in updates if update.sizes], getattr(rule, "window", None))
    return history


def _write(path: Path, optimizer: MeZO, header: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # two would need twice the room; whoever is killed here begins from the base weights
    moments = [moment for t in optimizer.tuned for moment in optimizer.history.moments.get(t.name, ())]
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        line = json.dumps({**header, "moments": len(moments) // len(optimizer.tuned)}, separators=(",", ":"))
        file.write(f"{line}\n".encode())
        for tensor in (*(t.parameter for t in optimizer.tuned), *moments):
            file.write(_bytes(tensor.detach().cpu().contiguous()))
    os.replace(partial, path)


def _fill(path: Path, file: IO[bytes], tensors: Iterable[Tensor]) -> None:
    """Read tensors from a file, into themselves, or into a copy of one where they lie elsewhere: a file that is mapped would
    count as memory of the process."""
    for tensor in tensors:
        direct = tensor.device.type == "cpu" and tensor.is_contiguous()
        target = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
        room = _bytes(target)
        if file.readinto(room) != len(room):  # type: ignore[attr-defined]
            raise InputError(f"{path} is damaged: resume the run without it, from its base model")
        if not direct:
            tensor.copy_(target)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the processor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
