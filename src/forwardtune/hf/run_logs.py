"""L6: the step logs of a trainer's runs, each beside the one before it: ``steps.jsonl``, ``steps-2.jsonl``, and so on."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

from torch import nn

from ..trajectory import read_log, replay
from ..trajectory.replay import tuned_by_header
from ..trajectory.updates import trajectory_of

STEP_LOG = "steps.jsonl"


class RunLogs:
    """Which log a run of a trainer writes.

    A second run of the same trainer goes on from where the first one ended, with steps that are counted from 0 again, so it has a log of its own.
    """

    def __init__(self) -> None:
        self._number, self._written = 1, set[Path]()

    def path(self, folder: Path) -> Path:
        """The log of the present run, in its folder."""
        return _log(folder, self._number)

    def begin(self, folder: Path) -> None:
        """A new run begins there: beside this trainer's own logs. One of another trainer is not looked for, and is found in the way."""
        self._number = next(n for n in count(1) if _log(folder, n) not in self._written)

    def opened(self, path: Path) -> None:
        """The run's log is there: it is this trainer's."""
        self._written.add(path)

    def go_on(self, folder: Path, model: nn.Module) -> None:
        """The last run there goes on: a model that the first one began with is brought to where that one began, by replay.

        Raises:
            LogError: a log is damaged.
        """
        paths = list(takewhile(Path.exists, (_log(folder, n) for n in count(1))))
        self._number = max(1, len(paths))
        self._written.update(paths)
        logs = [read_log(path) for path in paths] if len(paths) > 1 else []
        for log in logs[:-1]:
            now = tuned_by_header(trajectory_of(log), model).digest()
            if now == log.header["base"] != logs[-1].header["base"]:
                replay(log, model, steps=log.steps)


def _log(folder: Path, number: int) -> Path:
    name = Path(STEP_LOG)
    return folder / (STEP_LOG if number == 1 else f"{name.stem}-{number}{name.suffix}")
