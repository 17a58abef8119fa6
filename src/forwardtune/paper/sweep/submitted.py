"""Runs of a sweep as jobs of SLURM, or of processes of this machine, through submitit: ``forwardtune[slurm]``."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError

#: By the names that they are imported by.
LAUNCHING = {"submitit": "submitit"}


def run_command(command: Sequence[str], log: str, environment: dict[str, str]) -> int:
    """Run a command within a job, its output to a file. Returns its exit code; a signal that ends the job is passed on."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
    return process.wait()


class Job:
    """A submitted command, as :class:`subprocess.Popen` would be."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, if it is over: 1 if the job ended without one, as one that was cancelled."""
        if self.returncode is None and self._job.done():
            try:
                self.returncode = int(self._job.result())
            except Exception:  # submitit's own, or what the cluster did to the job
                self.returncode = 1
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Whatever it is, the scheduler ends the job, with a signal before it kills; the step log stays."""
        self._job.cancel(check=False)

    def kill(self) -> None:
        self._job.cancel(check=False)

    def wait(self) -> int:
        self._job.wait()
        code = self.poll()
        return 1 if code is None else code


class Submitter:
    """Starts commands as jobs.

    Args:
        cluster: ``slurm`` or ``local``.
        folder: where submitit keeps its files.
        given: ``NAME=VALUE`` for submitit, as ``slurm_partition=gpu``, ``timeout_min=600``, ``gpus_per_node=1``.

    Raises:
        InputError: there is no SLURM here, or submitit does not know a name.
    """

    def __init__(self, cluster: str, folder: Path, given: Sequence[str]) -> None:
        import submitit

        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": 24 * 60, **dict(map(_parameter, given))})
        except (RuntimeError, NameError, TypeError) as error:
            raise InputError(f"--launcher {cluster}: {error}") from None

    def __call__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> Job:
        return Job(self._executor.submit(run_command, list(command), str(log.absolute()), environment))


def _parameter(text: str) -> tuple[str, int | str]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise InputError(f"--launcher-option {text}: write it as NAME=VALUE, such as slurm_partition=gpu")
    return name, int(value) if value.isdigit() else value
