"""Methods that spend the same two forward passes a step, on SST-2 with the 135M model: which learns most, by steps and by seconds.

    python benchmarks/methods.py --data FOLDER                 # a scan of rates, then the best of each over more steps and seeds
    python benchmarks/methods.py --data FOLDER --methods dense example_1 --rates 5 --scan 100 --steps 300 --seeds 0 1 2

On a GPU, where launches and not the device are what a step of so small a model waits for, ``--device cuda --workers 12`` runs as many at
once. FOLDER holds train.jsonl and validation.jsonl of SST-2. A method's rate is the one with the lowest loss on the dev split at the end of a
scan (one seed); its curve is then run for every seed, and measured on dev and, at the end, on test, which chose nothing. Every
run is a line of the result; a second call goes on with what is missing. Seconds a step are measured at the end, all methods in turn, with
nothing else going on (``--time``); curves are drawn over steps and multiplied by them.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import HERE, parser, write
from timing import interleave

from forwardtune import MeZO
from forwardtune.evaluation import evaluate, find_layout, prepare
from forwardtune.models import load_model, start_from_inputs, tune
from forwardtune.objectives import logits_at, option_cross_entropy
from forwardtune.tasks import get_task, load_splits
from forwardtune.tasks.encoding import Encoder

BATCH, EPS, DEV, TEST, MEASURE = 16, 1e-3, 200, 436, 50


@dataclass(frozen=True)
class Method:
    """A way to spend two forward passes, and the middle of its rates, which lie a factor of the square root of ten apart.

    ``falls``: the rate falls to 0 over the run, linearly.
    """

    middle: float
    settings: dict[str, Any] = field(default_factory=dict)
    tune: str = "all"
    adapter: dict[str, Any] = field(default_factory=dict)
    falls: bool = False


EXAMPLE = {"assignment": "example", "rank": 1, "perturbation": "both_signs"}
#: The matrices that are worth perturbing most: up and down projections of the second two thirds of the 30 layers.
LATE_MLP = r"layers\.[12]\d\.mlp\.(up|down)_proj"


# B of LoRA beside a frozen A of the inputs' principal directions. At this rank A is sqrt(rank / (3 width)) = 0.1 times orthonormal (576
# wide), so eps 1e-2 perturbs as 1e-3 does the weights themselves, and a rate of 1e-2 moves them as 1e-4.
EVA = {"lora_rank": 16, "lora_init": "eva", "freeze_a": True}
# Minibatches from which A is taken.
INPUTS = 8

METHODS = {
    "dense": Method(3e-5),
    "low_rank": Method(3e-5, {"rank": 4, "refresh": 50}),
    "dense_late": Method(1e-4, tune=LATE_MLP),
    "dense_falls": Method(3e-5, falls=True),
    "example_1": Method(1e-4, EXAMPLE),
    "example_1_falls": Method(1e-4, EXAMPLE, falls=True),
    "example_1_signs": Method(1e-4, EXAMPLE | {"direction": "rademacher"}),
    "example_4": Method(1e-4, EXAMPLE | {"rank": 4}),
    "example_late": Method(6e-4, EXAMPLE, LATE_MLP),
    "example_late_falls": Method(6e-4, EXAMPLE, LATE_MLP, falls=True),
    "example_late_4_falls": Method(6e-4, EXAMPLE | {"rank": 4}, LATE_MLP, falls=True),
    "fzoo_examples": Method(3e-3, EXAMPLE | {"normalize": "spread"}),
    "fzoo_late": Method(1e-2, EXAMPLE | {"normalize": "spread"}, LATE_MLP),
    "layers_8": Method(3e-5, {"active_layers": 8}),
    "sparse": Method(1e-4, {"sparsity": 0.75}),
    "variance": Method(3e-5, {"modify": "variance"}),
    "expectation": Method(3e-5, {"modify": "expectation"}),
    "variance_gradients": Method(3e-5, {"modify": "variance", "modify_by": "gradients"}),
    "expectation_gradients": Method(3e-5, {"modify": "expectation", "modify_by": "gradients"}),
    "momentum": Method(3e-6, {"rule": "momentum", "rank": 4, "refresh": 50}),
    "muon": Method(3e-4, {"rule": "muon", "rank": 4, "refresh": 50}),
    "lora": Method(1e-3, {"eps": 1e-2}, "lora"),
    "lora_example": Method(3e-3, EXAMPLE | {"eps": 1e-2, "rank": 0}, "lora"),
    "eva_shared": Method(3e-3, {"eps": 1e-2}, "lora", EVA),
    "eva_example": Method(1e-2, EXAMPLE | {"eps": 1e-2, "rank": 0}, "lora", EVA),
    "eva_all_example": Method(
        1e-2, EXAMPLE | {"eps": 1e-2, "rank": 0}, "lora", {**EVA, "lora_targets": ["all-linear"]}
    ),
    "eva_late_example": Method(6e-2, EXAMPLE | {"eps": 1e-2, "rank": 0}, "lora", {**EVA, "lora_targets": [LATE_MLP]}),
}


#: Method, learning rate, seed, steps.
Key = tuple[str, float, int, int]


class Bench:
    """The model at its base weights, and the examples."""

    def __init__(self, data: str, model: str, dtype: str, device: str) -> None:
        self.task = get_task("sst2")
        self.model, self.tokenizer = load_model(model, dtype=dtype, device=device)
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        splits = load_splits(self.task, data_dir=data, dev_examples=DEV, test_examples=TEST)
        encoder = Encoder(self.tokenizer, 512)
        self.splits = {name: encoder(self.task, split.examples) for name, split in splits.items()}
        self.layout = find_layout(self.model, self.tokenizer, self.splits["train"])

    def optimizer(self, method: Method, lr: float, seed: int) -> tuple[Any, MeZO]:
        """A model to be tuned, and what tunes it."""
        self.model.load_state_dict(self.base)
        torch.manual_seed(seed)
        model = self.adapted(method)
        optimizer = MeZO(model, lr=lr, seed=seed, **{"eps": EPS, **method.settings})
        if optimizer.lacks_layers:
            optimizer.measure_layers(self.closure(model, optimizer, 0, seed))
        return model, optimizer

    def unload(self, model: Any) -> None:
        """Take an adapter off again."""
        if model is not self.model:
            self.model = model.unload()

    def adapted(self, method: Method) -> Any:
        """The model with what the method tunes."""
        adapter = dict(method.adapter)
        eva = adapter.pop("lora_init", None) == "eva"
        model = tune(self.model, self.tokenizer, method.tune, **adapter)
        if eva:
            some = self.splits["train"][: INPUTS * BATCH]
            batches = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
            start_from_inputs(model, [prepare(model, self.tokenizer, b, self.layout) for b in batches], logits_at)
        return model

    def closure(self, model: Any, optimizer: MeZO, step: int, seed: int) -> Callable[[], torch.Tensor]:
        """The loss of a minibatch, or the losses of its examples."""
        train = self.splits["train"]
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 * seed + step))[
            :BATCH
        ].tolist()
        batch = prepare(model, self.tokenizer, [train[i] for i in chosen], self.layout)
        if optimizer.estimator.per_example:
            return lambda: option_cross_entropy(model, batch)
        return lambda: option_cross_entropy(model, batch).mean()

    def measure(self, model: Any, split: str) -> dict[str, float]:
        """Loss and accuracy on a split."""
        return evaluate(model, self.tokenizer, self.task, self.splits[split], batch_size=25, layout=self.layout)

    def run(self, name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """One run: the dev split every so many steps, the test split at the end."""
        method = METHODS[name]
        model, optimizer = self.optimizer(method, lr, seed)
        dev = {0: self.measure(model, "dev")}
        for step in range(steps):
            if method.falls:
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step(self.closure(model, optimizer, step, seed))
            if (step + 1) % MEASURE == 0 or step + 1 == steps:
                dev[step + 1] = self.measure(model, "dev")
        row = {"method": name, "lr": lr, "seed": seed, "steps": steps, "dev": dev, "test": self.measure(model, "test")}
        self.unload(model)
        return row


def best_rate(rows: list[dict[str, Any]], name: str, scan: int) -> float:
    """The rate with the lowest dev loss at the end of the scan."""
    scanned = [row for row in rows if (row["method"], row["steps"], row["seed"]) == (name, scan, 0)]
    ended = {row["lr"]: row["dev"][str(scan)]["loss"] for row in scanned}
    return float(min(ended, key=lambda lr: ended[lr] if math.isfinite(ended[lr]) else math.inf))


_bench: Bench


def _begin(*arguments: str) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(*arguments)


def _run(key: Key) -> dict[str, Any]:
    return json.loads(json.dumps(_bench.run(*key)))


def runs(keys: Sequence[Key], workers: int, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs, in the order in which they end."""
    if workers == 1:
        global _bench
        if "_bench" not in globals():
            _bench = Bench(*arguments)
        yield from map(_run, keys)
    else:
        with multiprocessing.get_context("spawn").Pool(min(workers, len(keys) or 1), _begin, arguments) as pool:
            yield from pool.imap_unordered(_run, keys)


def main() -> None:
    """Run what is missing, and print the table."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", "example_1"])
    options.add_argument("--rates", type=int, default=7, help="rates of a scan, around the method's middle")
    options.add_argument("--scan", type=int, default=100, help="steps of a run of the scan")
    options.add_argument("--steps", type=int, default=300, help="0: nothing is run, for --time alone")
    options.add_argument("--lr", type=float, help="this rate, in the place of a scan's best")
    options.add_argument("--near", type=int, default=0, help="curves for so many rates on either side of it, too")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--device", default="cpu")
    options.add_argument("--workers", type=int, default=1, help="runs at once, each a process")
    options.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="measure seconds a step, too")
    options.add_argument("--output", default="methods")
    given = options.parse_args()
    path = HERE / "results" / f"{given.output}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = result["rows"]
    arguments = (given.data, given.model, given.dtype, given.device)

    def need(keys: Sequence[Key]) -> None:
        there = {(row["method"], row["lr"], row["seed"], row["steps"]) for row in rows}
        for row in runs([key for key in keys if key not in there], given.workers, arguments):
            rows.append(row)
            write(given.output, {"rows": rows, "seconds": result.get("seconds", {})})
            last = row["dev"][str(row["steps"])]
            print(
                f"{row['method']:16} lr {row['lr']:.0e} seed {row['seed']} {row['steps']:4} steps: "
                f"dev {last['loss']:.3f}, test {row['test']}",
                flush=True,
            )

    if given.steps:
        half = given.rates // 2
        scales = range(-half, given.rates - half) if given.lr is None else ()
        need(
            [
                (name, float(f"{METHODS[name].middle * 10 ** (k / 2):.1e}"), 0, given.scan)
                for k in scales
                for name in given.methods
            ]
        )
        need(
            [
                (
                    name,
                    float(f"{(given.lr or best_rate(rows, name, given.scan)) * 10 ** (k / 2):.1e}"),
                    seed,
                    given.steps,
                )
                for seed in given.seeds
                for name in given.methods
                for k in range(-given.near, given.near + 1)
            ]
        )
    if given.time:
        bench = Bench(*arguments)
        pairs = {
            name: bench.optimizer(METHODS[name], 1e-9, 0) for name in given.methods if METHODS[name].tune != "lora"
        }
        works = {
            name: (lambda model=model, optimizer=optimizer: optimizer.step(bench.closure(model, optimizer, 0, 0)))
            for name, (model, optimizer) in pairs.items()
        }
        result["seconds"] = interleave(works, given.time, given.device)
        write(given.output, {"rows": rows, "seconds": result["seconds"]})
    for name in given.methods if given.steps else ():
        ended = [row for row in rows if row["method"] == name and row["steps"] == given.steps]
        ended = [row for row in ended if row["lr"] == (given.lr or best_rate(rows, name, given.scan))]
        for step in ended[0]["dev"]:
            mean = sum(row["dev"][step]["loss"] for row in ended) / len(ended)
            seconds = result.get("seconds", {}).get(name)
            print(
                f"{name:16} {step:>5} steps{f' {int(step) * seconds:8.0f} s' if seconds else ''}: dev loss {mean:.3f}"
            )


if __name__ == "__main__":
    main()
