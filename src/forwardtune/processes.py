"""L0: the processes that a launcher started: how many, which of them this is, and what they compute with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .errors import InputError

# What launchers of MPI tell their processes; torchrun and accelerate launch say RANK and WORLD_SIZE.
_FOREIGN = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What torchrun, accelerate launch or a script of one's own says in the environment.

    Attributes:
        rank: number of this process, from 0.
        count: processes in all; 1 without a launcher.
        local_rank: number of this process on its machine.
        restarts: how often the launcher has started the whole group again.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    restarts: int = 0

    @classmethod
    def read(cls) -> Launch:
        """Raises InputError if a launcher started several processes and does not say RANK and WORLD_SIZE, or says nonsense."""
        count = _number("WORLD_SIZE", 1)
        if count <= 1:
            _refuse_foreign()
            return cls(restarts=_number("TORCHELASTIC_RESTART_COUNT", 0))
        rank = _number("RANK", -1)
        if not 0 <= rank < count:
            raise InputError(
                f"WORLD_SIZE={count} says that there are several processes, and RANK={os.environ.get('RANK')} does not say which this "
                f"is: start them with torchrun or accelerate launch. A process that has nothing to do with others wants WORLD_SIZE unset"
            )
        return cls(rank, count, _number("LOCAL_RANK", rank), _number("TORCHELASTIC_RESTART_COUNT", 0))


def is_first() -> bool:
    """Whether this process speaks for the group: the only one, or rank 0."""
    return _number("WORLD_SIZE", 1) <= 1 or _number("RANK", 0) == 0


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


def _refuse_foreign() -> None:
    for name in _FOREIGN:
        if (count := _number(name, 1)) > 1:
            raise InputError(
                f"a launcher started {count} processes ({name}={count}) that do not know of each other, and each would do the whole run: "
                f"start them with torchrun or accelerate launch. Runs that have nothing to do with each other want {name} unset"
            )


def versions() -> dict[str, str]:
    """Of Python, and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in ("forwardtune", "torch", "transformers", "numba"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The model of the processor, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
