"""One noise sweep over 100M weights, against an in-place multiply-add over the same memory.

    python benchmarks/sweep.py [--device cuda] [--weights 100000000]

Both use all torch threads, or the GPU. First the sweeps are checked against the plain definition on a stretch of the same tensor.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from machine import parser, write
from timing import interleave

from forwardtune.noise import DIRECTIONS, Noise, Update, definition

CHECKED = 100_000


def check(noise: Noise, weight: torch.Tensor) -> None:
    """The fast sweeps give the definition's bits."""
    piece = weight[:CHECKED].clone()
    fast, slow = torch.empty_like(piece), torch.empty_like(piece.cpu())
    noise.perturb(fast, piece, tensor=1, step=2, probe=0, scale=1e-3)
    definition.perturb(slow, piece.cpu(), noise.direction, noise.seed, 1, 2, 0, 1e-3)
    assert torch.equal(fast.cpu(), slow)
    fast, slow = piece.clone(), piece.cpu().clone()
    noise.update(fast, [Update(2, (1e-6,))], tensor=1)
    definition.update(slow, [Update(2, (1e-6,))], noise.direction, noise.seed, 1)
    assert torch.equal(fast.cpu(), slow)


def main() -> None:
    """Print and save the ratios."""
    asked = parser(__doc__)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--weights", type=int, default=100_000_000)
    options = asked.parse_args()
    if find_spec("numba"):
        from forwardtune.noise import cpu

        cpu._MIN_PER_THREAD_IN_FORWARD = cpu._MIN_PER_THREAD  # the sweep alone, not one between two modules
    name = "sweep" if torch.device(options.device).type == "cpu" else "sweep-cuda"
    rows = {}
    print(f"{'dtype':10}{'direction':12}{'perturb':>10}{'update':>10}   (times of an in-place multiply-add)")
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator(options.device).manual_seed(0)
        weight = torch.empty(options.weights, dtype=dtype, device=options.device).normal_(std=0.02, generator=generator)
        other, out = weight.clone(), torch.empty_like(weight)
        for kind, direction in DIRECTIONS.items():
            noise = Noise(0, direction)
            check(noise, weight)
            seconds = interleave(
                {
                    "multiply_add": lambda weight=weight, other=other: weight.add_(other, alpha=1e-9),
                    "perturb": lambda noise=noise, weight=weight, out=out: noise.perturb(
                        out, weight, tensor=1, step=2, probe=0, scale=1e-3
                    ),
                    "update": lambda noise=noise, weight=weight: noise.update(weight, [Update(2, (1e-9,))], tensor=1),
                },
                rounds=9,
                device=options.device,
            )
            label = str(dtype).removeprefix("torch.")
            ratios = {work: seconds[work] / seconds["multiply_add"] for work in ("perturb", "update")}
            rows[f"{label} {kind}"] = {"seconds": seconds, **ratios}
            print(f"{label:10}{kind:12}{ratios['perturb']:10.2f}{ratios['update']:10.2f}", flush=True)
            write(name, {"weights": options.weights, "rows": rows})


if __name__ == "__main__":
    main()
