"""The baseline without training: the best of many random perturbations of all weights, voted or folded into one move.

    python benchmarks/random_search.py --data FOLDER
    python benchmarks/random_search.py --data FOLDER --candidates 50 --judged 64 --sigmas 1e-3 3e-3 --seeds 0 1 2

Each of ``--candidates`` models theta + sigma z_k is judged by its loss on the same ``--judged`` training examples; the ``--best`` K are kept. Folded, they
are one model, theta + (sigma / K) sum_k z_k. Voted, they are K models that answer together, with the mean of their probabilities, at K times the
cost of an answer. 50 candidates on 64 examples are 3,200 forward passes of an example, as many as 100 steps of two passes of 16. Of the sigmas, the one with the
lowest folded loss on the dev split is told; test chose nothing. SST-2, as in ``methods.py``. A second call goes on with what is missing.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from machine import HERE, parser, write
from methods import Bench
from torch import Tensor

from forwardtune.evaluation import prepare
from forwardtune.noise import Noise
from forwardtune.objectives import option_cross_entropy
from forwardtune.objectives.likelihood import option_scores


class Candidates:
    """Models around the base weights, one at a time in the place of the base."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.noise = bench, Noise(seed)
        self.weights = dict(bench.model.named_parameters())  # a tied head once

    def become(self, numbers: list[int], sigma: float) -> None:
        """The model is the base plus sigma times the mean of some directions."""
        for tensor, (name, weight) in enumerate(self.weights.items()):
            weight.data.copy_(self.bench.base[name])
            moved = weight.data.float()
            for number in numbers:
                self.noise.perturb(moved, moved, tensor=tensor, step=0, probe=number, scale=sigma / len(numbers))
            weight.data.copy_(moved)

    @torch.no_grad()
    def judge(self, count: int) -> float:
        """The mean loss on training examples."""
        bench, losses = self.bench, []
        for begin in range(0, count, 16):
            batch = prepare(bench.model, bench.tokenizer, bench.splits["train"][begin : begin + 16], bench.layout)
            losses.append(option_cross_entropy(bench.model, batch))
        return float(torch.cat(losses)[:count].mean())

    @torch.no_grad()
    def answers(self, split: str) -> tuple[Tensor, Tensor]:
        """Probabilities of the options, and the right ones, for every example of a split."""
        bench, found, right = self.bench, [], []
        examples = bench.splits[split]
        for begin in range(0, len(examples), 20):
            batch = prepare(bench.model, bench.tokenizer, examples[begin : begin + 20], bench.layout)
            found.append(option_scores(bench.model, batch).float().softmax(dim=-1))
            right.append(batch["labels"])
        return torch.cat(found), torch.cat(right)


def told(probabilities: Tensor, right: Tensor) -> dict[str, float]:
    """Loss and accuracy of answers."""
    loss = -probabilities.double().gather(1, right[:, None]).log().mean()
    return {"loss": float(loss), "accuracy": float((probabilities.argmax(dim=-1) == right).double().mean())}


def run(bench: Bench, seed: int, sigma: float, candidates: int, judged: int, best: int) -> dict[str, Any]:
    """One search."""
    around = Candidates(bench, seed)
    losses = {}
    for number in range(candidates):
        around.become([number], sigma)
        losses[number] = around.judge(judged)
    chosen = sorted(losses, key=lambda number: losses[number])[:best]
    votes: dict[str, list[Tensor]] = {"dev": [], "test": []}
    for number in chosen:
        around.become([number], sigma)
        for split, found in votes.items():
            found.append(around.answers(split)[0])
    around.become(chosen, sigma)
    folded, voted = {}, {}
    for split, found in votes.items():
        probabilities, right = around.answers(split)
        folded[split], voted[split] = told(probabilities, right), told(torch.stack(found).mean(dim=0), right)
    bench.model.load_state_dict(bench.base)
    spread = statistics.stdev(losses.values())
    return {
        "seed": seed,
        "sigma": sigma,
        "judged": statistics.fmean(losses.values()),
        "spread": spread,
        "folded": folded,
        "voted": voted,
    }


def main() -> None:
    """Run what is missing, and print it."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--candidates", type=int, default=50)
    options.add_argument("--judged", type=int, default=64)
    options.add_argument("--best", type=int, default=5)
    options.add_argument("--sigmas", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--device", default="cpu")
    given = options.parse_args()
    how = {"candidates": given.candidates, "judged": given.judged, "best": given.best}
    path = HERE / "results" / "random_search.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    torch.set_num_threads(1)
    bench = Bench(given.data, given.model, given.dtype, given.device)
    for seed in given.seeds:
        for sigma in given.sigmas:
            key = {"seed": seed, "sigma": sigma, **how}
            if any(key.items() <= row.items() for row in rows):
                continue
            rows.append(run(bench, seed, sigma, **how) | how)
            write("random_search", {"rows": rows})
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
