"""What pieces of work take: seconds against each other, interleaved in one process, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from forwardtune import memory


def interleave(
    works: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each piece of work; one untimed round first, then all of them in turn, ``rounds`` times.

    On a GPU the clock is read when everything that was launched is done. ``time.process_time`` as the clock counts the seconds of
    processors, for machines that do other things too.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            _finish(device)
            began = clock()
            work()
            _finish(device)
            seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_of(work: Callable[[], object], device: str) -> int:
    """Bytes of memory at the peak of a piece of work."""
    memory.reset_peak(device)
    work()
    return memory.peak(device)


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
