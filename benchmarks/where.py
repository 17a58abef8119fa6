"""Where directions should lie: what the best step is expected to gain, by layers and by subspaces of the layers' inputs.

    python benchmarks/where.py --data FOLDER

FOLDER holds train.jsonl and validation.jsonl of SST-2. A step of MeZO with Gaussian directions inside a subspace S of the weights gains at most

    |g|^4 / (2 tr H (|g|^2 + tr Sigma / B))          one direction for the minibatch of B
    |g|^4 B / (2 tr H (|g|^2 + tr Sigma))            one for each example

with gradient g, Gauss-Newton matrix H and covariance Sigma of the examples' gradients, all within S. They are taken exactly, by backpropagation of each
example's difference of answers' scores, in float32, for every fourth layer of the 135M model: untuned, and after a few steps along the
exact gradient of a minibatch, when the answers' prior is calibrated. Of the inputs of each layer S takes, or leaves out, the mean and the
principal directions (not centred), measured on other examples. The result has everything in units of all weights with one shared direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import parser, write
from methods import Bench
from torch import Tensor, nn

from forwardtune.evaluation import prepare
from forwardtune.objectives import option_cross_entropy, option_scores

EXAMPLES, BATCHES = 40, (16, 64)
LAYERS = range(2, 30, 4)
STEPS, RATE = 6, 1e-3
LATE, FORWARD = tuple(range(10, 30)), ("up_proj", "down_proj")
#: Layers and kinds of projections.
PLACES: dict[str, tuple[Any, Any]] = {
    "all": (range(30), None), "layers 10-29": (LATE, None), "up, down": (range(30), FORWARD), "up, down 10-29": (LATE, FORWARD),
    "query, value": (range(30), ("q_proj", "v_proj")),
}  # fmt: skip
#: Of the inputs: all, without something, that alone.
INPUTS = ("all", "-mean", "-top 1", "-top 4", "top 1", "top 4", "top 16")


class Where:
    """The model, and what is measured of it."""

    def __init__(self, data: str) -> None:
        torch.set_num_threads(1)
        self.bench = Bench(data, "smollm2-135m", "float32", "cpu")
        self.train = self.bench.splits["train"]
        self.layers = {
            name: module
            for name, module in self.bench.model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }
        for parameter in self.bench.model.parameters():
            parameter.requires_grad_(False)
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)

    def batch(self, first: int, count: int) -> Any:
        return prepare(self.bench.model, self.bench.tokenizer, self.train[first : first + count], self.bench.layout)

    def descend(self, step: int) -> None:
        """One step along the exact gradient of a minibatch."""
        self.bench.model.zero_grad()
        option_cross_entropy(self.bench.model, self.batch(100 + 16 * step, 16)).mean().backward()
        with torch.no_grad():
            for layer in self.layers.values():
                layer.weight -= RATE * layer.weight.grad

    def spaces(self, layers: dict[str, nn.Linear]) -> dict[str, dict[str, Tensor]]:
        """The mean input of each layer and the principal ones, rows of length 1."""
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        with torch.no_grad(), _inputs(layers, seen):
            for first in (500, 516):
                option_cross_entropy(self.bench.model, batch := self.batch(first, 16))
                counted = batch["examples_at"].flatten() >= 0
                for rows in seen.values():
                    rows[-1] = rows[-1][counted][::2]
        found = {}
        for name, rows in seen.items():
            x = torch.cat(rows).double()
            top = torch.linalg.eigh(x @ x.T)[1][:, -16:].flip(1).T @ x
            unit = torch.cat([x.mean(0, keepdim=True), top])
            unit = (unit / unit.norm(dim=1, keepdim=True)).float()
            found[name] = {"mean": unit[:1], "top 1": unit[1:2], "top 4": unit[1:5], "top 16": unit[1:]}
        return found

    def measure(self) -> dict[str, dict[str, dict[str, float]]]:
        """Place -> inputs -> ``|g|^2``, ``tr H``, ``|g|^2 + tr Sigma``, and gains."""
        layers = {name: layer for name, layer in self.layers.items() if _number(name) in LAYERS}
        spaces, mean = self.spaces(layers), {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
        curvature = {(name, kind): 0.0 for name in layers for kind in ("all", *spaces[name])}
        moment, square = dict(curvature), dict(curvature)
        for i in range(EXAMPLES):
            self.bench.model.zero_grad()
            scores = option_scores(self.bench.model, self.batch(i, 1))[0]
            (difference := scores[1] - scores[0]).backward()
            p = float(torch.sigmoid(difference))
            residual = p - self.train[i].label
            for name, layer in layers.items():
                mean[name] += residual / EXAMPLES * layer.weight.grad
                for kind in ("all", *spaces[name]):
                    size = _size(layer.weight.grad, spaces[name].get(kind))
                    curvature[name, kind] += p * (1 - p) * size / EXAMPLES
                    moment[name, kind] += residual**2 * size / EXAMPLES
        for name, kind in square:  # without the part of it that is noise
            of_mean = _size(mean[name], spaces[name].get(kind))
            square[name, kind] = (EXAMPLES * of_mean - moment[name, kind]) / (EXAMPLES - 1)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for place, (numbers, kinds) in PLACES.items():
            names = [n for n in layers if _number(n) in numbers and (kinds is None or n.endswith(kinds))]
            found[place] = {
                inputs: _gains(*(_total(of, names, inputs) for of in (square, curvature, moment))) for inputs in INPUTS
            }
        unit = dict(found["all"]["all"])
        for row in (row for rows in found.values() for row in rows.values()):
            for size in BATCHES:
                for who in ("shared", "example"):
                    row[f"{who} {size}"] = round(row[f"{who} {size}"] / unit[f"shared {size}"], 2)
        return found


def _number(name: str) -> int:
    return int(name.partition(".layers.")[2].partition(".")[0])


@contextmanager
def _inputs(layers: dict[str, nn.Linear], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def _size(gradient: Any, rows: Tensor | None) -> float:
    """The squared norm of the part along these inputs."""
    return float((gradient if rows is None else gradient @ rows.T).square().sum())


def _total(of: dict[tuple[str, str], float], names: list[str], inputs: str) -> float:
    without = inputs.startswith("-")
    return sum(of[n, "all"] - of[n, inputs[1:]] if without else of[n, inputs] for n in names)


def _gains(square: float, curvature: float, moment: float) -> dict[str, float]:
    row = {"g2": square, "trH": curvature, "moment": moment}
    for size in BATCHES:
        row[f"shared {size}"] = square**2 / (2 * curvature * (square + (moment - square) / size))
        row[f"example {size}"] = square**2 * size / (2 * curvature * moment)
    return row


def main() -> None:
    """Measure at both points, and print the gains."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    given = options.parse_args()
    where = Where(given.data)
    result: dict[str, Any] = {}
    for point in ("untuned", "calibrated"):
        if point == "calibrated":
            for step in range(STEPS):
                where.descend(step)
        loss = where.bench.measure(where.bench.model, "dev")["loss"]
        result[point] = {"dev_loss": loss, "gains": where.measure()}
        write("where", result)
        print(f"{point}, dev loss {loss:.3f}")
        for place, rows in result[point]["gains"].items():
            for inputs, row in rows.items():
                told = "  ".join(f"{name} {row[name]:5.2f}" for name in row if " " in name)
                print(f"  {place:15} {inputs:7} |g|^2 {row['g2']:8.3f}  tr H {row['trH']:8.3f}  {told}", flush=True)


if __name__ == "__main__":
    main()
