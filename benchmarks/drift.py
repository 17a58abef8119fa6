"""How far the weights move when nothing is learnt: a thousand steps with learning rate zero.

    python benchmarks/drift.py

``in_place`` adds +eps z, -2 eps z, +eps z to the stored weights, as the published loop does; ``scratch`` does not write.
Weights are Gaussian with standard deviation 0.02, eps is 1e-3. The drift is the relative change in the Euclidean norm.
"""

from __future__ import annotations

import torch
from machine import write
from torch import nn

from forwardtune.noise import Noise
from forwardtune.parameters import TunedParameters
from forwardtune.points import PERTURBATIONS

STEPS, CHECKPOINTS = 1000, (100, 1000)


@torch.no_grad()
def main() -> None:
    """Print and save the drift of each way to perturb, by dtype."""
    rows = {}
    print(f"{'perturbation':14}{'dtype':10}" + "".join(f"{steps:>14,} steps" for steps in CHECKPOINTS))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in ("in_place", "scratch"):
            model = nn.Linear(512, 512, bias=False, dtype=dtype)
            model.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
            before = model.weight.float().clone()
            tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
            perturbation = PERTURBATIONS[name](tuned, Noise(0))
            drift = {}
            for step in range(STEPS):
                with perturbation:
                    for sign in (1, -1):
                        perturbation.shift(step, 0, sign * 1e-3)
                        model(torch.ones(1, 512, dtype=dtype))
                if step + 1 in CHECKPOINTS:
                    drift[step + 1] = float((model.weight.float() - before).norm() / before.norm())
            label = str(dtype).removeprefix("torch.")
            rows[f"{name} {label}"] = drift
            print(f"{name:14}{label:10}" + "".join(f"{drift[steps]:>19.2%} " for steps in CHECKPOINTS))
    write("drift", {"rows": rows})


if __name__ == "__main__":
    main()
