"""What a noise sweep costs an element, part by part, and what that lets a step cost: where the time above the floor goes.

    python benchmarks/roofline.py [--weights 100000000]

Each part of the kernels in ``noise/cpu_kernels.py`` is timed as a kernel of its own, in the same tiles, on one core and on all of torch's
threads: ``philox`` (the random words alone), ``gather`` (the look-ups alone, words given), ``add`` (widen, add, narrow and store, z
given), ``round`` (the same with stochastic rounding and the count, in place), beside the whole ``perturb`` and ``update``. Beneath them lie

* ``multiply_add``: ``a += x b`` by torch over the same weights; its bytes over its time are the bandwidth;
* ``multiplies``: the 20 products of 32 bits that a Philox block of 8 elements takes, each with the one shift and one exclusive
  or that cannot be left out, and nothing else; twice as many where an update draws for its rounding too.

A sweep takes at least as long as its bytes at that bandwidth, and as the multiplies of its words. The greater of the two is its
``bound``. From it follows the least step / (2 x forward) of the model of SmolLM2-135M's shape on this processor: two
perturbations and one update of every weight on all cores, beside two forward passes measured here. ``now`` is the same sum with the
kernels as they are, ``parts`` with the times of their parts on their own. None of the three counts torch's spinning threads, which
slow down what runs between two modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from machine import parser, write
from shapes import loss_of, make, minibatch
from timing import interleave

from forwardtune.noise import GAUSSIAN, Noise, Update, cpu, cpu_conversions

_fill, _gather = cpu.kernels._fill, cpu.kernels._gather
_widen, _narrow, _round = cpu_conversions.widen, cpu_conversions.narrow, cpu_conversions.round_stochastically
TILE, BLOCKS = cpu.kernels.TILE, cpu.kernels.BLOCKS


@numba.njit(nogil=True)
def multiplies(lo: int, hi: int):  # type: ignore[no-untyped-def]
    """As many products as Philox takes: 20 for a block of 8 elements, in two chains whose halves cross."""
    low, sink = np.uint64(0xFFFFFFFF), np.uint64(0)
    words = np.arange(BLOCKS).astype(np.uint64)
    for _ in range(lo // TILE, hi // TILE):
        for b in range(BLOCKS):
            c0, c2 = words[b], words[b] + np.uint64(1)
            for _ in range(10):
                p0 = np.uint64(0xD2511F53) * (c0 & low)
                p1 = np.uint64(0xCD9E8D57) * (c2 & low)
                c0 = (p1 >> np.uint64(32)) ^ p0
                c2 = (p0 >> np.uint64(32)) ^ p1
            words[b] = c0 ^ c2
        sink ^= words[0]
    return sink


@numba.njit(nogil=True)
def philox(lo: int, hi: int):  # type: ignore[no-untyped-def]
    """The random words of every tile."""
    words, sink = np.empty(2 * BLOCKS, np.uint64), np.uint64(0)
    one = np.uint32(1)
    for tile in range(lo // TILE, hi // TILE):
        _fill(words, np.uint32(tile * BLOCKS), BLOCKS, one, one, one, one, one)
        sink ^= words[tile % (2 * BLOCKS)]
    return sink


@numba.njit(nogil=True)
def gather(table, halves, shift, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """The look-ups of every tile, from words that stay in the first-level cache as those of the real kernel do."""
    z, sink = np.empty(TILE, np.float32), np.float32(0)
    for tile in range(lo // TILE, hi // TILE):
        first = (tile % (halves.shape[0] // TILE)) * TILE
        _gather(z, table, halves[first : first + TILE], shift)
        sink += z[tile % TILE]
    return sink


@numba.njit(nogil=True)
def add(out, source, z, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """Widen, add, narrow, store."""
    for tile in range(lo // TILE, hi // TILE):
        target, origin = out[tile * TILE : (tile + 1) * TILE], source[tile * TILE : (tile + 1) * TILE]
        for i in range(TILE):
            target[i] = _narrow(_widen(origin[i]) + z[i], origin[i])


@numba.njit(nogil=True)
def round_and_count(weight, z, halves, half_precision, lo: int, hi: int):  # type: ignore[no-untyped-def]
    """Widen, add, round, count, narrow, store in place: an update but for its random words and look-ups."""
    x, before, like, unchanged = np.empty(TILE, np.float32), np.empty(TILE, np.float32), weight[0], 0
    for tile in range(lo // TILE, hi // TILE):
        part = weight[tile * TILE : (tile + 1) * TILE]
        for i in range(TILE):
            before[i] = _widen(part[i])
            x[i] = before[i] + z[i]
        if half_precision:
            for i in range(TILE):
                x[i] = _widen(_narrow(_round(x[i], halves[i], like), like))
        same = np.int32(0)
        for i in range(TILE):
            same += np.int32(x[i] == before[i])
        unchanged += same
        for i in range(TILE):
            part[i] = _narrow(x[i], like)
    return unchanged


def timed(dtype: torch.dtype, count: int, rounds: int) -> dict[str, float]:
    """Nanoseconds an element of every part, with as many threads as torch has now."""
    weight = torch.empty(count, dtype=dtype).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    other, out = weight.clone(), torch.empty_like(weight)
    table, shift = GAUSSIAN.table(1e-3).numpy(), np.uint16(GAUSSIAN.shift)
    halves = np.random.default_rng(0).integers(0, 2**16, 8 * TILE, dtype=np.uint16)
    z = table[halves[:TILE] >> shift]
    noise, half = Noise(0), dtype != torch.float32

    def spread(kernel: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
        return lambda: cpu._spread(partial(kernel, *arguments), count, TILE, cpu._MIN_PER_THREAD)

    array = cpu._array
    works: dict[str, Callable[[], object]] = {
        "multiply_add": lambda: weight.add_(other, alpha=1e-9),
        "multiplies": spread(multiplies),
        "philox": spread(philox),
        "gather": spread(gather, table, halves, shift),
        "add": spread(add, array(out), array(weight), z),
        "round": spread(round_and_count, array(weight), z * np.float32(1e-6), halves, half),
        "perturb": lambda: noise.perturb(out, weight, tensor=1, step=2, probe=0, scale=1e-3),
        "update": lambda: noise.update(weight, [Update(2, (1e-9,))], tensor=1),
    }
    return {name: seconds / count * 1e9 for name, seconds in interleave(works, rounds).items()}


def bounds(ns: dict[str, float], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Nanoseconds an element of both sweeps: as they are, by their parts, and the least possible."""
    draws = 2 if dtype != torch.float32 else 1  # what an update draws
    memory = {"perturb": 2 / 3 * ns["multiply_add"], "update": 2 / 3 * ns["multiply_add"]}  # 2 accesses, not 3
    parts = {
        "perturb": ns["philox"] + ns["gather"] + ns["add"],
        "update": draws * ns["philox"] + ns["gather"] + ns["round"],
    }
    multiplying = {"perturb": ns["multiplies"], "update": draws * ns["multiplies"]}
    return {
        sweep: {
            "now": ns[sweep],
            "parts": parts[sweep],
            "memory": memory[sweep],
            "multiplies": multiplying[sweep],
            "bound": max(memory[sweep], multiplying[sweep]),
        }
        for sweep in ("perturb", "update")
    }


@torch.no_grad()
def forward(dtype: torch.dtype, rounds: int) -> tuple[float, int]:
    """Seconds of a forward pass of the 135M shape, and its number of weights."""
    model = make("smollm2-135m", dtype)
    seconds = interleave({"forward": loss_of(model, minibatch(model, length=32))}, rounds)["forward"]
    return seconds, sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Print and save nanoseconds an element, bandwidths, and the ratios."""
    asked = parser(__doc__)
    asked.add_argument("--weights", type=int, default=100_000_000, help="elements of a sweep")
    asked.add_argument("--rounds", type=int, default=9)
    options = asked.parse_args()
    count = -(-options.weights // TILE) * TILE
    cpu._MIN_PER_THREAD_IN_FORWARD = cpu._MIN_PER_THREAD
    threads, rows = torch.get_num_threads(), {}
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        ns = {}
        for cores in sorted({1, threads}):
            torch.set_num_threads(cores)
            ns[cores] = timed(dtype, count, options.rounds)
        accesses = {"multiply_add": 3, "add": 2, "round": 2, "perturb": 2, "update": 2}
        print(f"{label:14}{'bytes':>6}" + "".join(f"{f'ns on {cores}':>10}" for cores in ns))
        for part in ns[1]:
            size = accesses.get(part, 0) * dtype.itemsize
            print(f"  {part:12}{size:6}" + "".join(f"{ns[cores][part]:10.3f}" for cores in ns))
        bandwidth = {cores: 3 * dtype.itemsize / found["multiply_add"] for cores, found in ns.items()}
        rate = {cores: 20 / 8 / found["multiplies"] for cores, found in ns.items()}
        print("  bandwidth, GB/s: " + ", ".join(f"{value:.1f} on {cores}" for cores, value in bandwidth.items()))
        print("  products, 1e9/s: " + ", ".join(f"{value:.1f} on {cores}" for cores, value in rate.items()))
        sweeps = bounds(ns[threads], dtype)
        seconds, weights = forward(dtype, options.rounds)
        ratios = {
            kind: 1 + weights * 1e-9 * (2 * sweeps["perturb"][kind] + sweeps["update"][kind]) / (2 * seconds)
            for kind in ("now", "parts", "bound")
        }
        print(
            "  step / (2 x forward): " + ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items()), flush=True
        )
        rows[label] = {
            "nanoseconds": ns,
            "bytes": {part: accesses.get(part, 0) * dtype.itemsize for part in ns[1]},
            "gigabytes_per_second": bandwidth,
            "products_per_nanosecond": rate,
            "sweeps": sweeps,
            "forward_seconds": seconds,
            "step_over_floor": ratios,
        }
    write("roofline", {"weights": count, "rows": rows})


if __name__ == "__main__":
    main()
