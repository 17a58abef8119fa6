"""Peak memory of a piece of work: allocated bytes on an accelerator, resident bytes of the process on a CPU.

psutil is imported where a CPU is asked about: a GPU machine needs none.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def reset_peak(device: str | torch.device = "cpu") -> None:
    """Start a new peak. Where the platform cannot forget the old one, later peaks include it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: set the high-water mark to the present size
    except OSError:
        pass


def peak(device: str | torch.device = "cpu") -> int:
    """The peak since :func:`reset_peak`, in bytes."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # The mark that reset_peak sets back. psutil does not read it, and getrusage's own is never set back.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def now(device: str | torch.device = "cpu") -> int:
    """Bytes in use at this moment."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def trim_between(device: str | torch.device) -> None:
    """:func:`trim` between passes over minibatches of many sizes, of each of which a C library keeps a little more. Where tensors are on an accelerator there is nothing to return."""
    if torch.device(device).type == "cpu":
        trim()


def trim() -> None:
    """Return memory that was freed to the system, where the C library (glibc) keeps it: after a model was converted, hundreds of megabytes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def free(device: str | torch.device = "cpu") -> int:
    """Bytes that can still be had."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
