"""How many threads torch works with while other processes use the same cores.

torch's threads wait for each other after every operation, and keep their cores while they wait. If another process has the core of
one of them, all of them wait for a thread that does not run: beside a single busy process on two cores a step takes several
times as long as with one thread. So while others keep cores busy, fewer threads work.

Another number of threads may round a matrix product otherwise. It is changed only where a trial shows that it saves much, and
whoever changes it keeps a note of it. ``OMP_NUM_THREADS`` fixes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# Over so many seconds the use of the cores is averaged.
_SPAN = 1.0
# So many times as fast an evaluation must be with fewer threads, and with more.
_FASTER_WITH_FEWER, _FASTER_WITH_MORE = 1.5, 1.25
# After a trial that changed nothing the next one comes after so many times its duration, and twice as many each time.
_PAUSE, _LONGEST_PAUSE = 5.0, 40.0
# A trial of fewer seconds is repeated.
_SHORT = 0.1


@dataclass(frozen=True)
class Use:
    """Seconds that passed, that this process computed, and that the cores it may use were busy."""

    wall: float
    own: float
    busy: float
    cores: int

    @classmethod
    def now(cls) -> Use | None:
        """None where the system does not say, which Linux does."""
        try:
            allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            # user, nice, system, (idle, waiting,) interrupts
            ticks = [[int(number) for number in line[1:8]] for line in lines if line and line[0] in allowed]
            busy = sum(sum(line[:3]) + sum(line[5:7]) for line in ticks) / os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):
            return None
        return cls(time.monotonic(), time.process_time(), busy, len(ticks)) if busy else None

    def by_others(self, earlier: Use) -> float:
        """How many cores other processes kept busy since then, on average."""
        busy = (self.busy - earlier.busy) - (self.own - earlier.own)
        return max(0.0, busy / (self.wall - earlier.wall))


class SharedCores:
    """Watches the cores, and chooses torch's number of threads: at most as many as it had at first.

    Args:
        announce: told of changes.
    """

    def __init__(self, announce: Callable[[str], object] = lambda text: None) -> None:
        self.announce = announce
        #: The largest number of threads.
        self.most = torch.get_num_threads()
        self._since = Use.now() if self.most > 1 and not os.environ.get("OMP_NUM_THREADS") else None
        self._not_before, self._pause = 0.0, _PAUSE

    def look(self, evaluate: Callable[[], object]) -> int | None:
        """Try another number of threads, if the use of the cores since the last look suggests it.

        Args:
            evaluate: a piece of the work to come, such as one evaluation of the loss; its result is not used.

        Returns:
            The number of threads, if it was changed.
        """
        use = Use.now() if self._since is not None else None
        if use is None or self._since is None or use.wall - self._since.wall < _SPAN:
            return None
        others = use.by_others(self._since)
        self._since = use
        now = torch.get_num_threads()
        wanted = min(self.most, max(1, round(use.cores - others)))
        if wanted == now or use.wall < self._not_before:
            return None
        here = _seconds(evaluate)
        torch.set_num_threads(wanted)
        there = _seconds(evaluate)
        self._since = Use.now()
        if there * (_FASTER_WITH_FEWER if wanted < now else _FASTER_WITH_MORE) > here:
            torch.set_num_threads(now)
            self._not_before = time.monotonic() + self._pause * (here + there)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return None
        self._pause = _PAUSE
        self.announce(
            f"other processes keep {others:.1f} of {use.cores} cores busy: {_threads(wanted)} instead of {now}, which takes "
            f"{there:.2g} s for what took {here:.2g} s (OMP_NUM_THREADS fixes the number)"
        )
        return wanted

    def follow(self, threads: int | None) -> None:
        """Go on with the number of threads that a run had; None for the largest."""
        if self._since is not None:
            torch.set_num_threads(min(threads or self.most, self.most))


def _seconds(evaluate: Callable[[], object]) -> float:
    """The time that it takes; of a short one the least of three."""
    times: list[float] = []
    while not times or (times[0] < _SHORT and len(times) < 3):
        began = time.perf_counter()
        evaluate()
        times.append(time.perf_counter() - began)
    return min(times)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
