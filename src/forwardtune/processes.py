"""L0: several processes that a launcher started, where one is meant."""

from __future__ import annotations

import os

from .errors import InputError

# What torchrun, accelerate and the launchers of MPI tell their processes.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_one_process() -> None:
    """Raise InputError if this is one of several processes of a launcher: each of them would do the whole run."""
    for name in _SIZES:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise InputError(
                f"a launcher started {count} processes ({name}={count}), and each would do the same run: start one, with "
                "python in place of torchrun, accelerate launch or mpirun. A model too large for one GPU is spread over several "
                f"with device_map='auto'; runs that have nothing to do with each other want {name} unset"
            )
