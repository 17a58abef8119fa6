"""How many examples should share a direction, and does it help that their labels differ: what the best step is expected to gain.

    python benchmarks/groups.py --data FOLDER --task sst2 --sizes 1 2 4
    python benchmarks/groups.py --data FOLDER --task sst5 --sizes 1 2 3 5

FOLDER holds a folder of each task with its train.jsonl and validation.jsonl. Of a minibatch of B examples in groups of m, each of which has a direction, a step
gains at most

    |g|^4 (B / m) / (2 tr H E|g_m|^2)

with g_m the mean gradient of a group; |g|^2 and tr H are the same for all. The moments are exact, by backpropagation in float32, of the up and down projections of the last two thirds of
the layers of the 135M model: untuned, and after six steps along the exact gradient of a minibatch, when the answers' prior is calibrated. Groups
are of examples at random, or stratified by label (forwardtune.StratifiedSampler). Gains are in units of groups of one, at random.
"""

from __future__ import annotations

from math import lcm
from pathlib import Path
from typing import Any

import methods
import torch
from machine import parser, write
from where import LATE, SIZE, STEPS, Where, _number

from forwardtune import StratifiedSampler
from forwardtune.evaluation import prepare
from forwardtune.objectives import option_cross_entropy
from forwardtune.tasks import get_task

EXAMPLES = 240


class OfGroups(Where):
    """The moments of groups."""

    def moments(self, order: list[int], sizes: list[int]) -> dict[int, float]:
        """For each size m ``E|g_m|^2``, of groups one after the other."""
        step = lcm(*sizes) * max(1, round(SIZE / lcm(*sizes)))
        names = [n for n in self.layers if _number(n) in LATE and n.endswith(("up_proj", "down_proj"))]
        square, count = dict.fromkeys(sizes, 0.0), 0
        for first in range(0, EXAMPLES - step + 1, step):
            some = [self.train[i] for i in order[first : first + step]]
            batch = prepare(self.bench.model, self.bench.tokenizer, some, self.bench.layout)
            whose = batch["examples_at"].flatten()
            with self.watched() as seen:
                option_cross_entropy(self.bench.model, batch).sum().backward()
            count += step
            for name in names:
                inputs, gradients = seen[name]
                for size in sizes:
                    for begin in range(0, step, size):
                        own = (whose >= begin) & (whose < begin + size)
                        products = (gradients[own] @ gradients[own].T) * (inputs[own] @ inputs[own].T)
                        square[size] += float(products.sum()) / size  # |m g_m|^2 / m^2, of m examples
        return {size: found / count for size, found in square.items()}


def main() -> None:
    """Measure at both points, and print the gains."""
    options = parser(__doc__)
    options.add_argument("--data", required=True, type=Path)
    options.add_argument("--task", default="sst2")
    options.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    given = options.parse_args()
    methods.get_task = lambda _: get_task(given.task)
    where = OfGroups(str(given.data / given.task))
    labels = [example.label for example in where.train]
    orders = {"random": torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).tolist()}
    orders["stratified"] = list(StratifiedSampler(labels, seed=1))
    result: dict[str, Any] = {}
    for point in ("untuned", "calibrated"):
        for step in range(STEPS if point == "calibrated" else 0):
            where.descend(step)
        unit = 0.0
        for how, order in orders.items():
            moment = where.moments(order, given.sizes)
            unit = unit or moment[min(moment)]
            rows = {size: {"moment": found, "gain": round(unit / size / found, 2)} for size, found in moment.items()}
            result.setdefault(point, {})[how] = rows
            write(f"groups-{given.task}", result)
            print(
                f"{point:10} {how:10} " + "  ".join(f"m={m}: {r['gain']:5.2f}" for m, r in rows.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
