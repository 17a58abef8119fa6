"""Ranks as real processes, forked from this one: torch is imported already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

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
    port, begun = free_port(), []
    for rank in range(count):
        if rank in missing:
            begun.append((None, None))
            continue
        here, there = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_run, args=(work, rank, count, port, there), daemon=True)
        process.start()
        there.close()
        begun.append((process, here))
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


def _run(work: Callable[[int], Any], rank: int, count: int, port: int, answer: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        result: Any = work(rank)
    except BaseException as error:
        result = error
    answer.send(result)
    os._exit(0)  # without the clean-up of the process that this one was forked from
