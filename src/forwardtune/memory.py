"""Peak memory of a piece of work: allocated bytes on an accelerator, resident bytes of the process on a CPU."""

from __future__ import annotations

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
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
