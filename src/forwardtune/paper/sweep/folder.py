"""What runs have left on the disk, and so what is still to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import read_json, write_json
from .plan import Run, Sweep, show

try:
    import fcntl
except ImportError:  # not on this platform: two sweeps in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

PLAN = "sweep.json"
_LOCK = "sweep.lock"
# Full weights of a run, which its step log rebuilds. An adapter's file has another name, is small, and stays.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "checkpoint-*")


class SweepFolder:
    """A sweep's folder. ``FOLDER/`` of a run is the run's own; the sweep writes beside it.

    ``FOLDER.json`` holds what was asked of the run, ``FOLDER.log`` what it said, ``FOLDER.failed`` why it failed. They are
    beside and not inside because a run refuses a folder that is not empty, and because a run that cannot be resumed is
    begun again in an empty folder, and keeps its log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- one run -------------------------------------------------------------------------------------------------

    def of(self, run: Run) -> Path:
        """Where the run writes."""
        return self.path / run.folder

    def beside(self, run: Run, ending: str) -> Path:
        """The sweep's own file of a run."""
        return self.path / f"{run.folder}.{ending}"

    def log_file(self, run: Run) -> Path:
        """The run's output."""
        return self.beside(run, "log")

    def metrics(self, run: Run) -> dict[str, Any] | None:
        """The metrics of a finished run; None for one that is not finished."""
        metrics = read_json(self.of(run) / "metrics.json")
        return metrics if isinstance(metrics.get("test"), dict) else None

    def failure(self, run: Run) -> str | None:
        """Why the run failed; None if it did not, or was never tried."""
        file = self.beside(run, "failed")
        return file.read_text(encoding="utf-8").strip() if file.exists() else None

    def seconds(self, run: Run) -> float | None:
        """How long the run took, all its parts together."""
        seconds = read_json(self.beside(run, "json")).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    def state(self, run: Run) -> str:
        """``finished``, ``failed``, ``started`` (resumed), or ``new`` (what is there, if anything, is removed)."""
        if self.metrics(run) is not None:
            return "finished"
        if self.failure(run) is not None:
            return "failed"
        return "started" if self._has_steps(run) else "new"

    def begin(self, run: Run) -> bool:
        """Make room for the run, and record what is asked of it. True if it goes on with its own earlier steps."""
        resumed = self._has_steps(run) and self._recorded(run) == run.asked
        if not resumed:
            shutil.rmtree(self.of(run), ignore_errors=True)
            self.log_file(run).unlink(missing_ok=True)
        self.beside(run, "failed").unlink(missing_ok=True)
        self.beside(run, "json").parent.mkdir(parents=True, exist_ok=True)
        write_json(self.beside(run, "json"), {**run.asked, "seconds": (self.seconds(run) if resumed else None) or 0.0})
        return resumed

    def end(self, run: Run, seconds: float, keep_model: bool) -> None:
        """Note the time of a run that has stopped, and drop weights that are not wanted."""
        write_json(self.beside(run, "json"), {**run.asked, "seconds": (self.seconds(run) or 0.0) + seconds})
        if not keep_model and self.metrics(run) is not None:
            for pattern in _WEIGHTS:
                for path in self.of(run).glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def fail(self, run: Run, reason: str) -> None:
        """Mark a run as failed."""
        self.beside(run, "failed").write_text(reason + "\n", encoding="utf-8")

    def _has_steps(self, run: Run) -> bool:
        return (self.of(run) / "steps.jsonl").is_file()

    def _recorded(self, run: Run) -> dict[str, Any]:
        return {key: value for key, value in read_json(self.beside(run, "json")).items() if key in run.asked}

    # --- all of them ---------------------------------------------------------------------------------------------

    def require_same_runs(self, runs: list[Run]) -> None:
        """Raise InputError if a run that has results, or steps, was asked for with other options.

        A failed run may change: other options are what it needs.
        """
        changed = [
            run for run in runs if self.state(run) in ("finished", "started") and self._recorded(run) != run.asked
        ]
        if changed:
            first = changed[0]
            more = f" ({len(changed)} runs differ)" if len(changed) > 1 else ""
            raise InputError(
                f"{self.of(first)} holds a run with {_difference(self._recorded(first), first.asked)}{more}: choose "
                "another --output-dir, or remove the folders of the runs that are to be done again (nothing was changed)"
            )

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Inside, no other sweep can work in the folder. Yields the lock's file, for runs to inherit.

        A run that a killed sweep left behind holds the lock until it ends: two processes never write to one run.

        Raises:
            InputError: another sweep is at work here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): choose another --output-dir") from None
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InputError(
                        f"another sweep, or a run that a killed sweep left behind, is at work in {self.path}: wait for "
                        "it, or choose another --output-dir"
                    ) from None
            yield file
        finally:
            os.close(file)

    def write_plan(self, sweep: Sweep) -> None:
        """Write ``sweep.json``, which the report reads."""
        write_json(self.path / PLAN, sweep.to_json())

    def read_plan(self) -> Sweep:
        """The sweep that was begun here last.

        Raises:
            InputError: none was.
        """
        try:
            return Sweep.from_json(read_json(self.path / PLAN))
        except (KeyError, TypeError):
            raise InputError(
                f"{self.path} is not the folder of a sweep (no {PLAN} in it): make one with forwardtune sweep"
            ) from None


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that differs, for people."""
    if not before:
        return "no record of its options"
    flat = [{**{k: v for k, v in each.items() if k != "options"}, **each.get("options", {})} for each in (before, now)]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        values = [show(each[key]) if key in each else "not given" for each in flat]
        if values[0] != values[1]:
            return f"{key} {values[0]}, and the sweep file now asks for {values[1]}"
    return "other options"
