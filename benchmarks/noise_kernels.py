"""The kernels of a device against the plain definition: the same bits, how much faster, and what a launch costs the host.

    python benchmarks/noise_kernels.py [--device cuda] [--weights 16777216]

It needs torch alone, with Triton on a GPU and Numba on a CPU. Every sweep is compared with the definition on the CPU: awkward sizes,
shards, both directions, values of every magnitude. Then a few steps of each rule are taken on the device, logged, and replayed there
and on the CPU, with the same bits. Ends with exit code 1 where anything differs, or where the definition has to serve.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import parser, write
from timing import interleave
from torch import Tensor, nn

from forwardtune import MeZO, StepLog, noise, replay
from forwardtune.method.rules import RULES
from forwardtune.noise import DIRECTIONS, GAUSSIAN, Direction, Noise, Update, definition

SEED = 0x0123456789ABCDEF
SIZES = (1, 7, 1023, 4097, 100_000)
# The last one lies in the highest blocks that a 32-bit counter can number.
STARTS = (0, 1, 8, 2047, 2**35 - 2**17)
UPDATES = [Update(0, (1e-3, 0.0, -3e-2)), Update(1, ()), Update(2, (1e-6,), decay=0.75), Update(3, (), decay=0.5)]
LAUNCHES = 300


def weights(dtype: torch.dtype, count: int) -> Tensor:
    """Values of every magnitude from subnormal ones to near the largest, both signs; many of a weight's usual size."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    x[::3] *= 10.0 ** torch.empty(x[::3].numel(), dtype=torch.float64).uniform_(-40, 37, generator=generator)
    x[1::3] *= 0.02
    return x.clamp(-60_000, 60_000).to(dtype) if dtype == torch.float16 else x.to(dtype)


def differences(kernels: Any, direction: Direction, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """The sweeps that do not give the definition's bits."""
    for size, start in zip(SIZES, STARTS, strict=True):
        source = weights(dtype, size)
        address, place = (direction, SEED, 7, 11, 1, 1e-3, start), (direction, SEED, 7, start)
        here, expected = torch.empty_like(source, device=device), torch.empty_like(source)
        kernels.perturb(here, source.to(device), *address)
        definition.perturb(expected, source, *address)
        if not same(here, expected):
            yield f"perturb, {size} elements from {start}"
        here, expected = source.to(device, copy=True), source.clone()
        counts = int(kernels.update(here, UPDATES, *place)), int(definition.update(expected, UPDATES, *place))
        if not same(here, expected) or counts[0] != counts[1]:
            yield f"update, {size} elements from {start}"
        if dtype in (torch.bfloat16, torch.float16):
            x = source.float() * 1.001
            here, expected = source.to(device, copy=True), source.clone()
            counts = (
                int(kernels.store(here, x.to(device), SEED, 7, 11, start)),
                int(definition.store(expected, x, SEED, 7, 11, start)),
            )
            if not same(here, expected) or counts[0] != counts[1]:
                yield f"store, {size} elements from {start}"
    for width in (1, 7, 1024, 1030):
        table, rows = weights(dtype, 40 * width).view(40, width), torch.tensor([39, 0, 7, 7])
        whole = torch.empty_like(table)
        definition.perturb(whole.view(-1), table.view(-1), direction, SEED, 2, 3, 1, 1e-2)
        here = torch.empty(4, width, dtype=dtype, device=device)
        kernels.perturb_rows(here, table.to(device), rows.to(device), direction, SEED, 2, 3, 1, 1e-2)
        if not same(here, whole[rows]):
            yield f"perturb_rows, width {width}"


def same(here: Tensor, expected: Tensor) -> bool:
    """Equal storage."""
    return torch.equal(here.cpu().view(torch.uint8), expected.view(torch.uint8))


def runs(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """The rules whose steps on the device do not replay with the same bits, there and on the CPU."""
    tokens = torch.arange(32, device=device).view(4, 8)

    def model(where: torch.device) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(40, 48), nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 40)).to(dtype).to(where)

    for rule in RULES:
        tuned = model(device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "steps.jsonl")
            optimizer = MeZO(tuned, lr=1e-3, eps=1e-2, rule=rule, weight_decay=0.1)
            with StepLog(path, optimizer):
                for _ in range(5):
                    optimizer.step(lambda tuned=tuned: tuned(tokens).float().logsumexp(dim=-1).mean())
            for where in {device, torch.device("cpu")}:
                base = model(where)
                try:
                    replay(path, base)  # the digest at the log's end included
                except ValueError as error:
                    yield f"{rule} replayed on {where}: {error}"
                    continue
                pairs = zip(base.parameters(), tuned.parameters(), strict=True)
                if not all(same(a.detach(), b.detach().cpu()) for a, b in pairs):
                    yield f"{rule} replayed on {where}: other weights"


def times(kernels: Any, dtype: torch.dtype, device: torch.device, count: int, rounds: int) -> dict[str, float]:
    """Seconds of a sweep over ``count`` weights, by kernel and by definition on the same device."""
    weight = torch.empty(count, dtype=dtype, device=device).normal_(std=0.02)
    other, out = weight.clone(), torch.empty_like(weight)
    address, place = (GAUSSIAN, SEED, 7, 11, 1, 1e-3), ([Update(2, (1e-9,))], GAUSSIAN, SEED, 7)
    works: dict[str, Callable[[], object]] = {
        "multiply_add": lambda: weight.add_(other, alpha=1e-9),
        "perturb": lambda: kernels.perturb(out, weight, *address),
        "update": lambda: kernels.update(weight, *place),
        "perturb_by_definition": lambda: definition.perturb(out, weight, *address),
        "update_by_definition": lambda: definition.update(weight, *place),
    }
    return interleave(works, rounds, str(device))


def microseconds_a_launch(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Host time of a call on a small tensor, from call to return: many small modules make it what a step costs."""
    weight, rows = torch.full((32, 64), 0.02, dtype=dtype, device=device), torch.arange(8, device=device)
    out, drawn = torch.empty_like(weight), Noise(SEED)
    address = {"tensor": 1, "step": 2, "probe": 0, "scale": 1e-3}
    works: dict[str, Callable[[], object]] = {
        "add_": lambda: weight.add_(out, alpha=0.0),
        "perturb": lambda: drawn.perturb(out, weight, **address),
        "perturb_rows": lambda: drawn.perturb_rows(weight, rows, **address),
        "update": lambda: drawn.update(weight, [Update(2, (1e-9,))], tensor=1),
    }
    found = {}
    out.zero_()
    for name, work in works.items():
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            work()
        found[name] = (time.perf_counter() - began) / LAUNCHES * 1e6
    return found


def main() -> None:
    """Print and save; exit code 1 if a bit differs."""
    asked = parser(__doc__)
    asked.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked.add_argument("--weights", type=int, default=1 << 24)
    asked.add_argument("--rounds", type=int, default=7)
    options = asked.parse_args()
    # With its index: that is how a tensor names its device.
    device = torch.empty(0, device=options.device).device
    warnings.filterwarnings("ignore", "forwardtune computes its noise with plain torch")  # said below
    rows, failed = {}, False
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        label = str(dtype).removeprefix("torch.")
        kernels = noise.backends.fast(device, dtype)
        row: dict[str, Any] = {"kernels": kernels if isinstance(kernels, str) else kernels.__name__}
        wrong = list(runs(dtype, device))
        if isinstance(kernels, str):
            wrong.insert(0, f"the definition serves: {kernels}")
        else:
            for name, direction in DIRECTIONS.items():
                wrong += [f"{name}: {what}" for what in differences(kernels, direction, dtype, device)]
            row["microseconds_a_launch"] = microseconds_a_launch(dtype, device)
            row["seconds"] = times(kernels, dtype, device, options.weights, options.rounds)
        row["wrong"] = wrong
        rows[label], failed = row, failed or bool(wrong)
        print(f"{label:10}" + ("the definition's bits" if not wrong else f"{len(wrong)} WRONG: " + "; ".join(wrong)))
        for what, numbers in row.items():
            if isinstance(numbers, dict):
                print(f"    {what}: " + ", ".join(f"{key} {number:.3g}" for key, number in numbers.items()), flush=True)
        name = "kernels" if device.type == "cpu" else "kernels-cuda"
        write(name, {"weights": options.weights, "rows": rows})
    sys.exit(failed)


if __name__ == "__main__":
    main()
