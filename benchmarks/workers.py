"""What several ranks gain, and what exchanging losses costs.

    python benchmarks/workers.py speed       # two ranks with a thread each, against one rank with a thread
    python benchmarks/workers.py gather      # microseconds an exchange: processes, then simulated ranks

``speed``: two processes with a model of SmolLM2-135M's shape. In turn, rank 0 evaluates both queries of a step while the other waits, and
both evaluate one each. float32 at 16 x 128 tokens, bfloat16 at 16 x 32. Every rank repeats the update, so with a share u of the update in the
step of one rank, two ranks cannot be more than 2 / (1 + u) times as fast; u is timed too. Where other processes use the cores, the ratio of
processor seconds says more: of one rank, over those of the busier of two.

``gather``: ranks that exchange losses and evaluate nothing, as processes of this machine; then what a rank does with what up to 1,024 of
them sent (losses of a step log, ``--losses``, or made up), and two processes that exchange as many bytes as those would. From these and the
hops of a ring follows the arithmetic for 10,000.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import statistics
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import parser, write
from shapes import loss_of, make, minibatch

from forwardtune import MeZO
from forwardtune.trajectory import read_log
from forwardtune.workers import Alone, Parts, deal
from forwardtune.workers.ranks import Ranks, assembled
from forwardtune.workers.wire import FRAME

PROCESSES = (2, 4, 8)
SIMULATED = (2, 16, 128, 1024)
MANY = 10_000
SHAPES = {"float32 16 x 128": (torch.float32, 128), "bfloat16 16 x 32": (torch.bfloat16, 32)}


def launch(count: int, work: Any, *arguments: Any) -> Any:
    """What rank 0 gives of a function that runs as so many processes."""
    context = multiprocessing.get_context("fork")  # with torch imported, and nothing computed yet
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    answer = context.SimpleQueue()
    ranks = [context.Process(target=_run, args=(answer, port, rank, count, work, arguments)) for rank in range(count)]
    for process in ranks:
        process.start()
    result = answer.get()
    for process in ranks:
        process.join()
    return result


def _run(answer: Any, port: int, rank: int, count: int, work: Any, arguments: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    result = work(*arguments)
    if rank == 0:
        answer.put(result)


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(shape: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step of one rank, of two, and of the update alone."""
    workers = Ranks(1800.0, check_every=10**9)
    dtype, length = SHAPES[shape]
    model = make("smollm2-135m", dtype)
    optimizer = MeZO(model, lr=1e-9, workers=workers)
    closure = loss_of(model, minibatch(model, length=length))
    optimizer.step(closure)
    sent = workers.sent
    optimizer.step(closure)
    seconds: dict[str, list[float]] = {"one_rank": [], "two_ranks": [], "update": []}
    computed: dict[str, list[float]] = {"one_rank": [], "two_ranks": []}
    sent = workers.sent - sent
    for _ in range(rounds):
        workers.wait()
        if workers.is_first:
            optimizer.workers, began = Alone(), time.process_time()
            seconds["one_rank"].append(_timed(lambda: optimizer.estimate(closure)))
            seconds["update"].append(_timed(optimizer.apply))
            seconds["one_rank"][-1] += seconds["update"][-1]
            computed["one_rank"].append(time.process_time() - began)
            optimizer.workers = workers
        workers.wait()
        began = time.process_time()
        seconds["two_ranks"].append(_timed(lambda: optimizer.step(closure)))
        computed["two_ranks"].append(max(workers.all(time.process_time() - began)))
    if not workers.is_first:
        return {}
    found = {name: statistics.median(values) for name, values in seconds.items()}
    share = found["update"] / found["one_rank"]
    return {
        **{f"{name}_seconds": value for name, value in found.items()},
        "speedup": found["one_rank"] / found["two_ranks"],
        "bound": 2 / (1 + share),
        "speedup_by_processor_seconds": statistics.median(computed["one_rank"])
        / statistics.median(computed["two_ranks"]),
        "bytes_sent_to_each_rank_in_a_step": sent,
    }


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- gathering --------------------------------------------------------------------------------------------------------


def exchanges(size: int, times: int) -> float:
    """Median seconds of an exchange of so many bytes from each rank."""
    workers = Ranks(600.0)
    content = bytes(size)
    for _ in range(10):
        workers.all_bytes(content)
    return statistics.median(_timed(partial(workers.all_bytes, content)) for _ in range(times))


def assembling(ranks: int, losses: list[float], times: int = 20) -> float:
    """Median seconds in which a rank makes a step's losses of what so many ranks sent, one loss each."""
    dealt = deal(2, ranks // 2, ranks)
    sent = [bytes(16) + struct.pack("<d", losses[rank % len(losses)]) for rank in range(ranks)]
    parts = Parts([lambda: 0.0] * (ranks // 2))
    return statistics.median(_timed(partial(assembled, sent, dealt, 2, parts)) for _ in range(times))


def gather(losses: list[float], times: int) -> dict[str, Any]:
    """Microseconds by the number of ranks."""
    processes = {str(count): 1e6 * launch(count, exchanges, 24, times) for count in PROCESSES}
    simulated = {
        str(count): {
            "assembling_us": 1e6 * assembling(count, losses),
            "exchange_of_as_many_bytes_us": 1e6 * launch(2, exchanges, count // 2 * FRAME, times),
            "bytes_received": count * FRAME,
        }
        for count in SIMULATED
    }
    first, last = PROCESSES[0], PROCESSES[-1]
    hop = (processes[str(last)] - processes[str(first)]) / (last - first)
    most = str(SIMULATED[-1])
    return {
        "exchange_us_by_processes": processes,
        "us_for_each_further_rank": hop,
        "simulated": simulated,
        "seconds_for_10000": {
            "hops": 1e-6 * hop * MANY,
            "assembling": 1e-6 * simulated[most]["assembling_us"] * MANY / SIMULATED[-1],
            "bytes_received": MANY * FRAME,
        },
    }


def main() -> None:
    """Print and save what was asked for."""
    options = parser(__doc__)
    options.add_argument("what", choices=("speed", "gather"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--losses", type=Path, help="a step log whose losses are exchanged")
    options.add_argument("--shape", choices=SHAPES, action="append", help="of speed; all by default")
    given = options.parse_args()
    if given.what == "speed":
        result: dict[str, Any] = {shape: launch(2, speed, shape, given.rounds) for shape in given.shape or SHAPES}
    else:
        draw = random.Random(0)
        logged = [loss for record in read_log(given.losses).records for loss in record.losses] if given.losses else []
        result = gather(logged or [draw.gauss(1, 0.1) for _ in range(1024)], 40 * given.rounds)
    print(json.dumps(result, indent=2))
    write(f"workers-{given.what}", result)


if __name__ == "__main__":
    main()
