"""Running a sweep: each run is a process of its own, so that its memory is its own and so is its failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

from ...durations import duration
from .bases import Bases, dtype_of
from .folder import SweepFolder
from .plan import Run, Sweep, label

_POLL_SECONDS = 0.1
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Outcome:
    """What came of a sweep: how many runs are finished, which failed, and whether it was stopped before its end."""

    finished: int
    failed: list[Run] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> int:
        """Runs that are not tried again."""
        return self.finished + len(self.failed)


@dataclass
class _Child:
    run: Run
    process: Any
    begun: float


def run_sweep(
    sweep: Sweep,
    folder: SweepFolder,
    *,
    bases: Bases,
    jobs: int,
    say: Callable[[str], None],
    lock: int | None = None,
    program: Sequence[str] = (sys.executable, "-m", "forwardtune"),
    submit: Callable[[Sequence[str], Path, dict[str, str]], Any] | None = None,
) -> Outcome:
    """Do every run that is not finished, ``jobs`` of them at once.

    Args:
        sweep: what to run.
        folder: where; the caller holds its lock.
        bases: models to use in place of those named in the file.
        jobs: runs at once. They share the processor's cores between them.
        say: takes a line for people.
        lock: the lock's file, which runs inherit.
        program: the command line's beginning.
        submit: ``(command, file for its output, environment) -> process``, in place of a process of this machine.
    """
    pending = deque(run for run in sweep.runs if folder.metrics(run) is None)
    outcome = Outcome(len(sweep.runs) - len(pending))
    environment = {**os.environ, **thread_limits(jobs)} if submit is None else {}
    active: list[_Child] = []

    def start(run: Run) -> _Child:
        resumed = folder.begin(run)
        line = run.arguments(str(folder.of(run)), bases.get((run.model, dtype_of(run))))
        command = [*program, *line, *(["--resume"] if resumed else [])]
        if submit is not None:
            return _Child(run, submit(command, folder.log_file(run), environment), time.monotonic())
        with open(folder.log_file(run), "ab") as log:
            # A session of its own: Ctrl-C reaches the sweep alone, which passes it on once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=() if lock is None else (lock,),
            )
        return _Child(run, process, time.monotonic())

    def finish(child: _Child, stopping: bool) -> None:
        """Say and mark what came of a run."""
        run, code = child.run, child.process.returncode
        seconds = time.monotonic() - child.begun
        folder.end(run, seconds, sweep.keep_models)
        metrics = folder.metrics(run)
        if code == 0 and metrics is not None:
            outcome.finished += 1
            result = f"{_score(metrics, sweep.metrics[run.task])}, {duration(seconds)}"
        elif stopping:
            return
        else:
            reason = _reason(code, folder.log_file(run))
            folder.fail(run, reason)
            outcome.failed.append(run)
            result = f"failed: {reason}"
        left = [*pending, *(other.run for other in active)]
        ahead = f"; about {duration(time_left(sweep.runs, left, folder, jobs))} left" if left else ""
        say(f"[{outcome.done}/{len(sweep.runs)}] {run.title}: {result}{ahead}")

    with _noted_signals(say) as stops:
        sent = 0
        try:
            while active or (pending and not stops):
                while pending and len(active) < jobs and not stops:
                    active.append(start(pending.popleft()))
                if sent < len(stops):  # the first signal asks runs to stop, the second makes them
                    sent += 1
                    for child in active:
                        child.process.send_signal(signal.SIGINT if sent == 1 else signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
                for child in [child for child in active if child.process.poll() is not None]:
                    active.remove(child)
                    finish(child, bool(stops))
        finally:
            for child in active:  # an error of our own: no run may outlive the sweep
                child.process.kill()
                child.process.wait()
        outcome.stopped = bool(stops) and outcome.done < len(sweep.runs)
    return outcome


def time_left(runs: Sequence[Run], left: Sequence[Run], folder: SweepFolder, jobs: int) -> float:
    """Seconds that the runs in ``left`` will take, judged by those that are done.

    The nearest relatives count: the same method on the same task, else the method, else the task, else any run.
    """
    pending = {run.folder for run in left}
    times: dict[tuple[str | None, ...], list[float]] = {}
    for run in runs:
        seconds = folder.seconds(run)
        if run.folder not in pending and seconds is not None and folder.metrics(run) is not None:
            for kind in _relations(run):
                times.setdefault(kind, []).append(seconds)
    expected = sum(next((mean(times[kind]) for kind in _relations(run) if kind in times), 0.0) for run in left)
    return expected / min(jobs, max(1, len(left)))


def _relations(run: Run) -> list[tuple[str | None, ...]]:
    """What it shares with other runs, the nearest first."""
    model, task, method = run.model, run.task, run.method
    return [(model, task, method), (model, None, method), (model, task, None), ()]


def thread_limits(jobs: int) -> dict[str, str]:
    """Environment variables that divide the cores between ``jobs`` runs; a smaller number that is set stays."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // jobs)
    given = {name: os.environ.get(name, "") for name in _THREAD_VARIABLES}
    return {name: str(min(share, int(value)) if value.isdigit() else share) for name, value in given.items()}


def _score(metrics: dict[str, Any], metric: str) -> str:
    parts = [
        f"{split} {100 * metrics[split][metric]:.1f}" for split in ("test", "dev") if metric in metrics.get(split, {})
    ]
    return f"{label(metric)} {', '.join(parts)}"


def _reason(code: int, log: Path) -> str:
    """Why a run failed: the last line of its output, and what ended it."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1].removeprefix("forwardtune: error: ") if lines else "no output"
    if code == -signal.SIGKILL:
        return f"killed, as happens when memory runs out; its last line was: {last}"
    if code < 0:
        return f"ended by signal {-code}; its last line was: {last}"
    if code == 0:
        return f"it ended without a metrics.json that holds test; its last line was: {last}"
    return last


@contextmanager
def _noted_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Inside, signals that would end the process are noted in the list that is yielded instead."""
    stops: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not stops:
            say("\nstopping the runs; Ctrl-C again to kill them (step logs stay intact)")
        stops.append(number)

    # A sweep under nohup outlives its terminal.
    numbers = [number for number in _STOPS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
