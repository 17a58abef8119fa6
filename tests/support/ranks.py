"""Ranks as real processes, forked from this one: torch is imported already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

_FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def ranks(count: int, work: Callable[[int], Any], *, within: float = 60.0, missing: tuple[int, ...] = ()) -> list[Any]:
    """What ``work(rank)`` returns, or the exception that it raises, in as many processes, in the order of ranks.

    Args:
        missing: ranks that are never started; they give None.
    """
    begun = _begun(count, work, missing)
    results = []
    for process, here in begun:
        if process is None or here is None:
            results.append(None)
            continue
        try:
            results.append(here.recv() if here.poll(within) else TimeoutError(f"no answer within {within} s"))
        except EOFError:
            results.append(ChildProcessError("it died"))
        process.kill()
        process.join()
    return results


def ranks_with_a_kill(
    count: int, work: Callable[[int], Any], victim: int, now: Callable[[], bool], grace: float = 5.0
) -> list[Any]:
    """As :func:`ranks`, where one of them is killed when it is ``now``, unless it is done by then. The others have so long to see it, then
    they are killed, as torchrun does. None for one without an answer."""
    begun = _begun(count, work, ())
    process, here = begun[victim]
    while not here.poll(0.003) and not now():
        pass
    if not here.poll():
        process.kill()
    until, results = time.monotonic() + grace, []
    for process, here in begun:
        try:
            results.append(here.recv() if here.poll(max(0.0, until - time.monotonic())) else None)
        except EOFError:
            results.append(None)
        process.kill()
        process.join()
    return results


def forked(work: Callable[[], int]) -> Any:
    """A process forked from this one, so that nothing is imported again; it ends with the code that ``work`` returns."""

    def run() -> None:
        # As in _run; and the tests' clean-up is not this process's.
        tqdm.set_lock(threading.RLock())
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)

    process = _FORK.Process(target=run, daemon=True)
    process.start()
    return process


def _begun(count: int, work: Callable[[int], Any], missing: tuple[int, ...]) -> list[tuple[Any, Any]]:
    port = free_port()
    begun: list[tuple[Any, Any]] = []
    for rank in range(count):
        if rank in missing:
            begun.append((None, None))
            continue
        here, there = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_run, args=(work, rank, count, port, there), daemon=True)
        process.start()
        there.close()
        begun.append((process, here))
    return begun


def _run(work: Callable[[int], Any], rank: int, count: int, port: int, answer: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # tqdm's lock is one of all forked processes: who is killed while he has it would stop the others.
    tqdm.set_lock(threading.RLock())
    try:
        result: Any = work(rank)
    except BaseException as error:
        result = error
    answer.send(result)
    os._exit(0)  # without the clean-up of the process that this one was forked from
