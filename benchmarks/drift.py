"""How far the weights move when nothing is learnt: a thousand steps with learning rate zero.

    python benchmarks/drift.py

``in_place`` adds +eps z, -2 eps z, +eps z to the stored weights, as the published loop does; ``scratch`` does not write.
Weights are Gaussian with standard deviation 0.02, eps is 1e-3. The drift is the relative change in the Euclidean norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from machine import write
from torch import nn

from forwardtune.method.estimators import Query
from forwardtune.noise import Noise
from forwardtune.parameters import TunedParameters
from forwardtune.points import Scratch

STEPS, CHECKPOINTS, EPS = 1000, (100, 1000), 1e-3


def in_place(model: nn.Module, tuned: TunedParameters, noise: Noise) -> Callable[[int], None]:
    """The weights themselves go to both points, and come back only up to rounding."""

    def step(number: int) -> None:
        for scale in (EPS, -2 * EPS, EPS):
            for tensor in tuned:
                noise.perturb(tensor.parameter, tensor.parameter, tensor=tensor.id, step=number, probe=0, scale=scale)

    return step


def scratch(model: nn.Linear, tuned: TunedParameters, noise: Noise) -> Callable[[int], None]:
    """The model is evaluated at both points, on perturbed copies of its weights."""
    perturbation, ones = Scratch(tuned, noise), torch.ones(1, model.in_features, dtype=model.weight.dtype)

    def step(number: int) -> None:
        with perturbation:
            for scale in (EPS, -EPS):
                perturbation.shift(number, Query(0, scale))
                model(ones)

    return step


@torch.no_grad()
def main() -> None:
    """Print and save the drift of each way to perturb, by dtype."""
    rows = {}
    print(f"{'perturbation':14}{'dtype':10}" + "".join(f"{steps:>14,} steps" for steps in CHECKPOINTS))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for way in (in_place, scratch):
            model = nn.Linear(512, 512, bias=False, dtype=dtype)
            model.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
            before = model.weight.float().clone()
            tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
            step, drift = way(model, tuned, Noise(0)), {}
            for number in range(STEPS):
                step(number)
                if number + 1 in CHECKPOINTS:
                    drift[number + 1] = float((model.weight.float() - before).norm() / before.norm())
            label = str(dtype).removeprefix("torch.")
            rows[f"{way.__name__} {label}"] = drift
            print(f"{way.__name__:14}{label:10}" + "".join(f"{drift[steps]:>19.2%} " for steps in CHECKPOINTS))
    write("drift", {"rows": rows})


if __name__ == "__main__":
    main()
