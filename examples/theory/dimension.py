"""The number of weights does not slow MeZO down; the effective rank of the Hessian does.

    python examples/theory/dimension.py

Quadratics L = theta' H theta / 2 with |H| = 1, in dimensions from 128 to 65,536. On the left the eigenvalues decay, so that
the effective rank r = tr H / |H| is 8 in every dimension; on the right they are all 1, so r = d. The learning rate is the
one that Theorem 1 of MeZO (section 4.1) is best with, 1 / (l (r + 2)) for one Gaussian probe. The estimate itself does grow
with the dimension, as Lemma 2 says: |g^|^2 is d + 2 times |g|^2 on average. What is added lies where the loss is flat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from figures import COLOURS, panels, parser, save
from torch import nn

from forwardtune import MeZO

RANK = 8


class Quadratic(nn.Module):
    """L = sum_i h_i theta_i^2 / 2 from a point with L = 1 and all theta_i equal.

    A diagonal H is no loss of generality: Gaussian directions look the same in every basis.
    """

    def __init__(self, spectrum: np.ndarray) -> None:
        super().__init__()
        self.spectrum = torch.tensor(spectrum)
        self.theta = nn.Parameter(torch.full((len(spectrum),), (2 / spectrum.sum()) ** 0.5))

    def forward(self) -> torch.Tensor:
        """The loss, summed in float64."""
        return (self.spectrum * self.theta.double() ** 2).sum() / 2


@torch.no_grad()
def measured(spectrum: np.ndarray, lr: float, steps: int, seed: int) -> tuple[list[float], float]:
    """Loss before every step and after the last, and the mean of |g^|^2 / |g|^2."""
    quadratic = Quadratic(spectrum)
    # Two-sided differences of a quadratic are exact for every eps; a large one keeps float32 rounding out.
    optimizer = MeZO(quadratic, lr=lr, eps=0.1, seed=seed)
    losses, growth = [], 0.0
    for _ in range(steps):
        losses.append(float(quadratic()))
        before = quadratic.theta.double()
        optimizer.step(quadratic)
        estimate, gradient = (before - quadratic.theta) / lr, quadratic.spectrum * before
        growth += float(estimate.square().sum() / gradient.square().sum()) / steps
    return [*losses, float(quadratic())], growth


def expected(spectrum: np.ndarray, lr: float, steps: int) -> list[float]:
    """The exact expectation of the loss.

    theta <- (I - lr z z' H) theta, so m_i = E[theta_i^2] follows, by E[z_i^2 (z'a)^2] = |a|^2 + 2 a_i^2,
    m_i <- m_i - 2 lr h_i m_i + lr^2 (sum_j h_j^2 m_j + 2 h_i^2 m_i).
    """
    m = np.full(len(spectrum), 2 / spectrum.sum())
    losses = [float(spectrum @ m / 2)]
    for _ in range(steps):
        m = m - 2 * lr * spectrum * m + lr**2 * (spectrum**2 @ m + 2 * spectrum**2 * m)
        losses.append(float(spectrum @ m / 2))
    return losses


def measure(options: Any) -> dict[str, Any]:
    """Every spectrum in every dimension."""
    kept = slice(None, None, max(1, options.steps // 60))  # the file holds some 60 points of every curve
    result: dict[str, Any] = {"seeds": options.seeds, "steps": [*range(options.steps + 1)][kept], "curves": []}
    spectra = {"decaying": lambda d: (1 - 1 / RANK) ** np.arange(d), "isotropic": np.ones}
    for name, make in spectra.items():
        for dimension in options.dimensions:
            spectrum = make(dimension)
            rank = float(spectrum.sum() / spectrum.max())
            lr = 1 / (rank + 2)
            seeds = range(dimension, dimension + options.seeds)  # other directions in every dimension
            runs, growth = zip(*(measured(spectrum, lr, options.steps, seed) for seed in seeds), strict=True)
            error = np.std(runs, axis=0, ddof=1) / len(runs) ** 0.5
            curve = {"spectrum": name, "dimension": dimension, "effective_rank": rank, "lr": lr,
                     "growth": float(np.mean(growth)),
                     "mean": np.mean(runs, axis=0)[kept].tolist(),
                     "standard_error": error[kept].tolist(), "expected": expected(spectrum, lr, options.steps)[kept]}  # fmt: skip
            result["curves"].append(curve)
    return result


def table(result: dict[str, Any]) -> str:
    """The loss half-way and at the end: measured, its standard error, and the exact expectation."""
    steps = result["steps"]
    halves = (len(steps) // 2, len(steps) - 1)
    head = "".join(f"{f'step {steps[t]}':>12} {'+-':>8} {'exact':>8}" for t in halves)
    lines = [f"{'eigenvalues':11} {'d':>6} {'r':>8} {'lr':>8} {'|g^|2/|g|2':>11} {head}"]
    for c in result["curves"]:
        cells = "".join(f"{c['mean'][t]:12.4f} {c['standard_error'][t]:8.4f} {c['expected'][t]:8.4f}" for t in halves)
        setting = f"{c['spectrum']:11} {c['dimension']:6} {c['effective_rank']:8.1f} {c['lr']:8.1e}"
        lines.append(f"{setting} {c['growth']:11.0f} {cells}")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> Any:
    """Loss by step, one panel a spectrum; dots are the exact expectation (one for all on the left)."""
    figure, axes = panels(2)
    titles = {"decaying": f"effective rank {RANK} in every dimension", "isotropic": "isotropic: effective rank d"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        curves = [c for c in result["curves"] if c["spectrum"] == name]
        for i, (c, colour) in enumerate(zip(curves, COLOURS, strict=False)):
            axis.plot(result["steps"], c["mean"], color=colour, label=f"d = {c['dimension']:,}")
            label = "exact expectation" if i == len(curves) - 1 else None
            axis.plot(result["steps"][::6], c["expected"][::6], "k.", markersize=5, label=label, zorder=3)
        axis.set(xlabel="step", ylabel="loss, relative to the start", title=title, yscale="log", ylim=(4e-3, 1.5))
        axis.legend(loc="lower left")
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write figure and numbers."""
    options = parser(__doc__)
    options.add_argument("--dimensions", type=int, nargs="+", default=[128, 1024, 8192, 65536])
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--seeds", type=int, default=32)
    options = options.parse_args(arguments)
    if options.quick:
        options.dimensions, options.steps, options.seeds = [128, 1024, 8192], 120, 8
    result = measure(options)
    print(table(result))
    return save("dimension", result, draw(result), options.output_dir)


if __name__ == "__main__":
    main()
