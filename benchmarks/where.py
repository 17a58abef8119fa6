"""Where directions should lie: what the best step is expected to gain, by layers and by subspaces of the layers' inputs.

    python benchmarks/where.py --data FOLDER

FOLDER holds train.jsonl and validation.jsonl of SST-2. A step of MeZO with Gaussian directions inside a subspace S of the weights gains at most

    |g|^4 / (2 tr H (|g|^2 + tr Sigma / B))          one direction for the minibatch of B
    |g|^4 B / (2 tr H (|g|^2 + tr Sigma))            one for each example

with gradient g, Gauss-Newton matrix H and covariance Sigma of the examples' gradients, all within S. They are taken exactly, by backpropagation
of the difference of each example's scores, in float32, for the linear layers of the 135M model: untuned, and after a few steps along the exact
gradient of a minibatch, when the answers' prior is calibrated. Of the inputs of each layer S takes, or leaves out, the mean and the
principal directions (not centred), measured on other examples. Gains are in units of all layers with one shared direction.
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

EXAMPLES, DEV, SIZE, BATCHES = 64, 64, 16, (16, 64)
STEPS, RATE = 6, 1e-3
LATE, FORWARD = tuple(range(10, 30)), ("up_proj", "down_proj")
#: Layers and kinds of projections.
PLACES: dict[str, tuple[Any, Any]] = {
    "all": (range(30), ""), "layers 10-29": (LATE, ""), "up, down": (range(30), FORWARD), "up, down 10-29": (LATE, FORWARD),
    "query, value": (range(30), ("q_proj", "v_proj")),
}  # fmt: skip
#: Parts of the inputs, by the rows of what spans them.
PARTS = {"mean": slice(0, 1), "top 1": slice(1, 2), "top 4": slice(1, 5), "top 16": slice(1, 17)}
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
        # So that gradients reach the layers' outputs.
        self.bench.model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())

    def batch(self, first: int, count: int) -> Any:
        return prepare(self.bench.model, self.bench.tokenizer, self.train[first : first + count], self.bench.layout)

    def descend(self, step: int) -> None:
        """One step along the exact gradient of a minibatch."""
        weights = [layer.weight.requires_grad_() for layer in self.layers.values()]
        loss = option_cross_entropy(self.bench.model, self.batch(100 + SIZE * step, SIZE)).mean()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.requires_grad_(False).sub_(gradient, alpha=RATE)

    def loss(self) -> float:
        """On examples of the dev split."""
        dev = self.bench.splits["dev"][:DEV]
        with torch.no_grad():
            batch = prepare(self.bench.model, self.bench.tokenizer, dev, self.bench.layout)
            return float(option_cross_entropy(self.bench.model, batch).mean())

    def spaces(self) -> dict[str, Tensor]:
        """The unit mean of each layer's inputs, and below it the 16 principal ones."""
        batch, found = self.batch(500, 2 * SIZE), {}
        counted = batch["examples_at"].flatten() >= 0
        with torch.no_grad(), self.watched() as seen:
            option_cross_entropy(self.bench.model, batch)
        for name, (inputs, _) in seen.items():
            x = inputs[counted][::2].double()
            rows = torch.cat([x.mean(0, keepdim=True), torch.linalg.eigh(x @ x.T)[1][:, -16:].flip(1).T @ x])
            found[name] = (rows / rows.norm(dim=1, keepdim=True)).float()
        return found

    @contextmanager
    def watched(self) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, each layer's inputs and the gradients of its outputs are noted, token by token."""
        seen: dict[str, list[Tensor]] = {}

        def note(name: str, inputs: Tensor, output: Tensor) -> None:
            seen[name] = [inputs.detach().flatten(0, -2), torch.empty(0)]
            if output.requires_grad:
                output.register_hook(lambda gradient: seen[name].__setitem__(1, gradient.flatten(0, -2)))

        handles = [
            layer.register_forward_hook(lambda _, given, out, name=name: note(name, given[0], out))
            for name, layer in self.layers.items()
        ]
        yield seen
        for handle in handles:
            handle.remove()

    def measure(self) -> dict[str, dict[str, dict[str, float]]]:
        """Place -> inputs -> ``|g|^2``, ``tr H``, ``|g|^2 + tr Sigma``, and gains."""
        spaces, mean = self.spaces(), {name: torch.zeros_like(layer.weight) for name, layer in self.layers.items()}
        square, curvature, moment = (
            {(n, part): 0.0 for n in self.layers for part in ("all", *PARTS)} for _ in range(3)
        )
        for first in range(0, EXAMPLES, SIZE):
            batch = self.batch(first, SIZE)
            whose = batch["examples_at"].flatten()
            with self.watched() as seen:
                scores = option_scores(self.bench.model, batch)
                difference = scores[:, 1] - scores[:, 0]
                difference.sum().backward()  # examples do not see each other
            p = torch.sigmoid(difference.detach())
            residual, spread = p - batch["labels"], p * (1 - p)
            for name, (inputs, gradients) in seen.items():
                mean[name] += (gradients * (residual[whose] * (whose >= 0) / EXAMPLES)[:, None]).T @ inputs
                along = inputs @ spaces[name].T
                for example in range(SIZE):
                    own = whose == example
                    of_outputs = gradients[own] @ gradients[own].T
                    for part in ("all", *PARTS):
                        x = inputs[own] if part == "all" else along[own][:, PARTS[part]]
                        size = float((of_outputs * (x @ x.T)).sum())  # |G|^2 for G = D^T X
                        curvature[name, part] += float(spread[example]) * size / EXAMPLES
                        moment[name, part] += float(residual[example]) ** 2 * size / EXAMPLES
        for name, part in square:  # without the part of it that is noise
            of_mean = mean[name] if part == "all" else mean[name] @ spaces[name][PARTS[part]].T
            square[name, part] = (EXAMPLES * float(of_mean.square().sum()) - moment[name, part]) / (EXAMPLES - 1)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for place, (numbers, kinds) in PLACES.items():
            names = [n for n in self.layers if _number(n) in numbers and n.endswith(kinds)]
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
        loss = where.loss()
        result[point] = {"dev_loss": loss, "gains": where.measure()}
        write("where", result)
        print(f"{point}, dev loss {loss:.3f}")
        for place, rows in result[point]["gains"].items():
            for inputs, row in rows.items():
                told = "  ".join(f"{name} {row[name]:5.2f}" for name in row if " " in name)
                print(f"  {place:15} {inputs:7} |g|^2 {row['g2']:8.3f}  tr H {row['trH']:8.3f}  {told}", flush=True)


if __name__ == "__main__":
    main()
