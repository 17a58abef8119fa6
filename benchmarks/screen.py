"""One step of every method: how far held-out loss falls, by learning rate, on average over many draws. Minutes, where runs take hours.

    python benchmarks/screen.py --data FOLDER                  # at the untuned model, and half-way
    python benchmarks/screen.py --data FOLDER --methods dense example_1 --draws 24

A draw is a minibatch and its directions. Every step of a method starts at the same weights: what differs is how well two forward passes see where to go. The second
point is the model after ``--half`` steps with shared directions (3e-5): by then the answers' prior is calibrated, and what is left to learn is
harder. Losses are of the same ``--held-out`` examples, so a difference has a small error; it is given.

A method's figure is its largest mean decrease over the rates. A line of the result for each method, point, draw and rate; a second call goes on
with what is missing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from machine import HERE, parser, write
from methods import METHODS, Bench, Method

from forwardtune.evaluation import evaluate

#: Rates of a method: its middle times these.
SCALES = (0.3, 1.0, 3.0, 10.0, 30.0)


class Screen:
    """The points at which steps are taken, and the examples that judge them."""

    def __init__(self, bench: Bench, held_out: int, half: int) -> None:
        self.bench, self.half = bench, half
        self.examples = bench.splits["dev"][:held_out]
        self.points = {"untuned": bench.base}

    def at(self, point: str) -> None:
        """Let methods begin there."""
        if point == "half" and point not in self.points:
            self.bench.base = self.points["untuned"]
            model, optimizer = self.bench.optimizer(METHODS["dense"], 3e-5, 0)
            for step in range(self.half):
                optimizer.step(self.bench.closure(model, optimizer, step, 0))
            self.points[point] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.bench.base = self.points[point]

    def loss(self, model: Any) -> float:
        """The loss on the held-out examples."""
        bench = self.bench
        return evaluate(model, bench.tokenizer, bench.task, self.examples, batch_size=32, layout=bench.layout)["loss"]

    def draws(self, method: Method, numbers: list[int]) -> Iterator[tuple[int, dict[float, float]]]:
        """Draw, and by how much the loss fell at each rate."""
        model, optimizer = self.bench.optimizer(method, method.middle, seed=1)
        start = [t.parameter.detach().clone() for t in optimizer.tuned]
        before = self.loss(model)
        for draw in numbers:
            optimizer.next_step, optimizer.held = draw, []
            optimizer.step(self.bench.closure(model, optimizer, draw, seed=1))
            (record,) = optimizer.held
            falls = {}
            for scale in SCALES:
                lr = float(f"{scale * method.middle:.1e}")
                optimizer.held = None
                optimizer.take(replace(record, lr=(lr,) * len(record.lr)))
                falls[lr] = before - self.loss(model)
                for tuned, values in zip(optimizer.tuned, start, strict=True):
                    tuned.parameter.data.copy_(values)
            yield draw, falls
        self.bench.unload(model)


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each point and method the best rate, the mean decrease there and its standard error."""
    found: dict[str, dict[str, Any]] = {}
    for point, name in sorted({(row["point"], row["method"]) for row in rows}, key=str):
        by_rate: dict[float, list[float]] = {}
        for row in rows:
            if (row["point"], row["method"]) == (point, name):
                by_rate.setdefault(row["lr"], []).append(row["fall"])
        means = {lr: statistics.fmean(falls) for lr, falls in by_rate.items() if all(map(math.isfinite, falls))}
        lr = max(means, key=lambda lr: means[lr])
        error = statistics.stdev(by_rate[lr]) / math.sqrt(len(by_rate[lr])) if len(by_rate[lr]) > 1 else math.nan
        found.setdefault(point, {})[name] = {"lr": lr, "fall": means[lr], "error": error, "draws": len(by_rate[lr])}
    return found


def main() -> None:
    """Screen what is missing, and print the table."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--points", nargs="+", choices=("untuned", "half"), default=["untuned", "half"])
    options.add_argument("--draws", type=int, default=12)
    options.add_argument("--half", type=int, default=100, help="steps to the second point")
    options.add_argument("--held-out", type=int, default=96)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--device", default="cpu")
    options.add_argument("--output", default="screen")
    given = options.parse_args()
    path = HERE / "results" / f"{given.output}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    screen = Screen(Bench(given.data, given.model, given.dtype, given.device), given.held_out, given.half)
    for point in given.points:
        for name in given.methods:
            there = {row["draw"] for row in rows if (row["point"], row["method"]) == (point, name)}
            missing = [draw for draw in range(given.draws) if draw not in there]
            if not missing:
                continue
            screen.at(point)
            for draw, falls in screen.draws(METHODS[name], missing):
                rows += [
                    {"point": point, "method": name, "draw": draw, "lr": lr, "fall": fall} for lr, fall in falls.items()
                ]
                write(given.output, {"table": table(rows), "rows": rows})
            best = table(rows)[point][name]
            print(
                f"{point:8} {name:20} falls by {best['fall']:.4f} +- {best['error']:.4f} at {best['lr']:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
