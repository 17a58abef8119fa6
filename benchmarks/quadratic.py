"""Two methods that would keep a state of the weights' size, on a quadratic in exact numbers: would they be worth it?

    python benchmarks/quadratic.py

HiZOO's diagonal of the Hessian and ConMeZO's cone around the momentum, written out in plain torch, beside MeZO. The loss is
``1/2 sum_i h_i x_i^2`` with ``h_i = i^-1``, in float64, so no rounding hides a difference of losses. What is seen of a minibatch is the loss
of a shifted minimum: its gradient has ``rho`` times the squared gradient for a variance at the start.

``correlation``: between the diagonal that HiZOO has found, averaged over all steps, and the true one, by dimension; of T steps the theory
gives ``sqrt(2 T) std(h) / sum(h)``, where that is small. ``loss``: what is left of the loss after so many evaluations, each method at its
best of the rates, mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from machine import parser, write
from torch import Tensor

EPS, DIMENSION, EVALUATIONS, RHO, SEEDS = 1e-3, 2000, 2000, 5.0, (0, 1)
RATES = [10 ** (k / 2) for k in range(-8, 0)]

#: (loss, weights, generator) -> the coefficient and the direction along which the weights move.
Estimate = Callable[[Callable[[Tensor], float], Tensor, torch.Generator], tuple[float, Tensor]]


def spectrum(dimension: int) -> Tensor:
    """The Hessian's diagonal."""
    return torch.arange(1, dimension + 1, dtype=torch.float64) ** -1.0


def gaussian(size: int, generator: torch.Generator) -> Tensor:
    """A direction."""
    return torch.randn(size, generator=generator, dtype=torch.float64)


def correlation(dimension: int, steps: int) -> float:
    """Of the true diagonal and HiZOO's: the mean of ``(l+ + l- - 2 l0) / (2 eps^2) z^2``, here without its absolute value and without its
    own scale, both of which only take from it."""
    h, generator = spectrum(dimension), torch.Generator().manual_seed(dimension)
    found = torch.zeros(dimension, dtype=torch.float64)
    for _ in range(steps):
        z = gaussian(dimension, generator)
        found += 0.5 * float(h @ z.square()) * z.square()  # what the three losses give, exactly
    return float(torch.corrcoef(torch.stack([found, h]))[0, 1])


def mezo() -> Iterator[Estimate]:
    """Two evaluations."""

    def estimate(loss: Callable[[Tensor], float], x: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        z = gaussian(len(x), generator)
        return (loss(x + EPS * z) - loss(x - EPS * z)) / (2 * EPS), z

    while True:
        yield estimate


def cone(angle: float, beta: float) -> Callable[[], Iterator[Estimate]]:
    """ConMeZO: directions ``sqrt(d) (cos m / |m| + sin u / |u|)``, ``m <- beta m + (1 - beta) c z``. Two evaluations."""

    def run() -> Iterator[Estimate]:
        momentum: list[Tensor] = []

        def estimate(loss: Callable[[Tensor], float], x: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
            u = gaussian(len(x), generator)
            z = u / u.norm() * math.sqrt(len(x))
            if momentum:
                z = math.cos(angle) * math.sqrt(len(x)) * momentum[0] / momentum[0].norm() + math.sin(angle) * z
            c = (loss(x + EPS * z) - loss(x - EPS * z)) / (2 * EPS)
            momentum[:] = [beta * momentum[0] + (1 - beta) * c * z if momentum else (1 - beta) * c * z]
            return c, z

        while True:
            yield estimate

    return run


def diagonal(alpha: float) -> Callable[[], Iterator[Estimate]]:
    """HiZOO: along ``D^{-1/2} z``, ``D <- (1 - alpha) D + alpha |l+ + l- - 2 l0| / (2 eps^2) D z^2``. Three evaluations."""

    def run() -> Iterator[Estimate]:
        state: list[Tensor] = []

        def estimate(loss: Callable[[Tensor], float], x: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
            d = state[0] if state else torch.ones_like(x)
            z = gaussian(len(x), generator)
            along = z / d.sqrt()
            plus, minus = loss(x + EPS * along), loss(x - EPS * along)
            curvature = abs(plus + minus - 2 * loss(x)) / (2 * EPS**2)
            state[:] = [(1 - alpha) * d + alpha * curvature * d * z.square()]
            return (plus - minus) / (2 * EPS), along

        while True:
            yield estimate

    return run


METHODS: dict[str, tuple[Callable[[], Iterator[Estimate]], int]] = {
    "mezo": (mezo, 2),
    "cone, 77 degrees, beta 0.99": (cone(1.35, 0.99), 2),
    "cone, 77 degrees, beta 0.9": (cone(1.35, 0.9), 2),
    "cone, 45 degrees, beta 0.99": (cone(math.pi / 4, 0.99), 2),
    "diagonal, alpha 1e-3": (diagonal(1e-3), 3),
    "diagonal, alpha 1e-2": (diagonal(1e-2), 3),
}


def left(method: Callable[[], Iterator[Estimate]], cost: int, rate: float, seed: int, rho: float) -> float:
    """What is left of the loss, as a share of that at the start."""
    h, generator = spectrum(DIMENSION), torch.Generator().manual_seed(seed)
    x = gaussian(DIMENSION, generator)
    start = float(h @ x.square())
    steps, estimates = EVALUATIONS // cost, method()
    for _ in range(steps):
        shift = math.sqrt(rho) * gaussian(DIMENSION, generator)  # x has unit variance at the start

        def loss(at: Tensor, shift: Tensor = shift) -> float:
            return 0.5 * float(h @ (at - shift).square())

        c, z = next(estimates)(loss, x, generator)
        x = x - rate * c * z
        if not math.isfinite(c) or abs(c) > 1e9:
            return math.inf
    return float(h @ x.square()) / start


def main() -> None:
    """Print and write both tables."""
    parser(__doc__).parse_args()
    correlations = {}
    for dimension, steps in ((100, 2000), (1000, 2000), (10_000, 2000), (100_000, 2000)):
        h = spectrum(dimension)
        theory = float(math.sqrt(2 * steps) * h.std() / h.sum())
        correlations[dimension] = {"steps": steps, "found": correlation(dimension, steps), "theory": theory}
        print(f"{dimension:7} weights, {steps} steps: correlation {correlations[dimension]['found']:.3f}", flush=True)
    losses: dict[str, dict[str, float]] = {}
    for rho in (0.0, RHO):
        for name, (method, cost) in METHODS.items():
            by_rate = {rate: sum(left(method, cost, rate, seed, rho) for seed in SEEDS) / len(SEEDS) for rate in RATES}
            best = min(by_rate, key=lambda rate: by_rate[rate])
            losses[f"rho {rho:g}: {name}"] = {"rate": best, "left": by_rate[best]}
            print(f"rho {rho:g}, {name:28} rate {best:.1e}: {by_rate[best]:.3f} of the loss is left", flush=True)
    write(
        "quadratic",
        {"dimension": DIMENSION, "evaluations": EVALUATIONS, "correlation": correlations, "loss": losses},
    )


if __name__ == "__main__":
    main()
