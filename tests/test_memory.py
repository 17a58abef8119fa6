"""What the process holds, as the system says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forwardtune import memory

MIB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets a peak when it is told to")


def held(count: int) -> torch.Tensor:
    """Memory that was written to, so that it is resident."""
    return torch.ones(count * MIB, dtype=torch.uint8)


def test_what_is_held_counts_while_it_is_held() -> None:
    before = memory.now()
    kept = held(64)
    assert 60 * MIB < memory.now() - before < 80 * MIB
    del kept
    memory.trim()  # once a library has raised the C library's bounds, large blocks are kept as well
    assert memory.now() - before < 16 * MIB


@linux
def test_a_peak_outlasts_what_caused_it_until_it_is_reset() -> None:
    memory.reset_peak()
    before = memory.peak()
    held(64)
    assert 60 * MIB < memory.peak() - before < 80 * MIB
    memory.trim()
    memory.reset_peak()
    assert memory.peak() - before < 16 * MIB


@linux
def test_free_is_what_the_kernel_calls_available() -> None:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    assert memory.free() == pytest.approx(int(line.split()[1]) * 1024, rel=0.2)
