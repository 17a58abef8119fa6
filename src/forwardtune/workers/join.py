"""How the processes of a launch find each other."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ..errors import InputError, UnreachableError, WorkerError
from ..processes import Launch

_POLL = 0.05
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def join(launch: Launch, timeout: float) -> None:
    """Make torch's default process group of the launched processes, unless there is one, and take this rank's GPU.

    Without an address in MASTER_ADDR the ranks meet on this machine, at its loopback address.

    Args:
        timeout: in seconds; for the others to come, and later for each of their answers.

    Raises:
        InputError: ranks did not come in time, or rank 0 cannot be reached.
        WorkerError: a rank came and is gone.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    if dist.is_initialized():
        return
    host, port = os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise InputError(
            f"MASTER_PORT={port or '(unset)'} is no port, at which ranks could meet: start them with torchrun or accelerate launch"
        )
    if host in _LOOPBACK and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens at the address of the machine's name
    store = PrefixStore(f"forwardtune/{launch.restarts}", _store(host, int(port), launch, timeout))
    _await(store, launch, timeout)
    # gloo for what lies on the host, as losses do, and nccl where there are GPUs: torch's own choice.
    backend = None if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.count, timeout=timedelta(seconds=timeout)
        )
        # Nobody goes on before all have met: a rank that fails at once would take the store along, at which others still look for each other.
        dist.all_reduce(torch.zeros(()))
    except RuntimeError as error:
        raise WorkerError(f"a process of the run is gone while they meet ({str(error).splitlines()[0]})") from None


def _store(host: str, port: int, launch: Launch, timeout: float) -> Store:
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    own = not served and launch.rank == 0
    # Bound by us: torch would listen on every interface.
    listening = socket.create_server((host, port), family=socket.AF_INET) if own and host in _LOOPBACK[:2] else None
    try:
        return TCPStore(
            host,
            port,
            is_master=own,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except (RuntimeError, OSError) as error:
        what = "cannot listen" if own else "cannot be reached"
        raise UnreachableError(
            f"rank {launch.rank}: rank 0 {what} at MASTER_ADDR={host}, MASTER_PORT={port}, within {timeout:.0f} s "
            f"({str(error).splitlines()[0]}): give an address at which rank 0 can be reached from every machine, and a free port"
        ) from None


def _await(store: Store, launch: Launch, timeout: float) -> None:
    """Go on when every rank has come."""
    until, missing = time.monotonic() + timeout, list(range(launch.count))
    try:
        store.set(f"here/{launch.rank}", "")
        while missing and time.monotonic() < until:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(_POLL if missing else 0)
    except RuntimeError:
        raise WorkerError(f"rank {launch.rank}: rank 0 is gone, or has given up waiting: see its message") from None
    if missing:
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        raise InputError(
            f"{who} of {launch.count} did not come within {timeout:.0f} s: see what became of them, or start fewer processes"
        )
