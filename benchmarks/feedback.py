"""LoRA that starts from a walk along the errors: where the walk ends, by its rate, its steps and the rank, and what it costs.

    python benchmarks/feedback.py --data FOLDER                                  # the 135M model on two tasks, the default walk, three seeds
    python benchmarks/feedback.py --data FOLDER --tasks sst2 sst5 squad --cosines --output feedback-cosines   # how right its directions are
    python benchmarks/feedback.py --data FOLDER --tasks squad --cosines --output feedback-cosines-attention   # those of queries and values, too
    python benchmarks/feedback.py --data FOLDER --tasks sst2 --rates 4e-3 8e-3 1.6e-2 --ranks 8 16 --seeds 0 --output feedback-rates
    python benchmarks/feedback.py --data FOLDER --tasks squad --prompts 0 0.1 0.3 --general-text FILE --output feedback-prompts   # losses over prompts

FOLDER holds a folder of data for every task. Loss and metric of the development and the test split, untuned and behind the walk (of text that is
written the loss alone), seconds of a step of the walk, and of a forward pass over the same minibatch.
"""

from __future__ import annotations

import json
import re
import time
from itertools import chain, islice, product, repeat
from pathlib import Path
from typing import Any

import torch
from machine import HERE, parser, write

from forwardtune import StratifiedSampler
from forwardtune.evaluation import evaluate, find_layout, prepare, training_objective
from forwardtune.forgetting import compared, read_general, token_losses
from forwardtune.models import load_model, start_from_feedback, tune
from forwardtune.models.feedback import FOR_A, _begun, _gradient, _learned
from forwardtune.models.tuning import LATE_ATTENTION, LATE_DOWN
from forwardtune.objectives import WithPrompts
from forwardtune.tasks import get_task, load_splits
from forwardtune.tasks.encoding import Encoder

BATCH, TRAIN, DEV, TEST, LENGTH = {"squad": 8}, 1000, 64, {"squad": 100}, 256


class Task:
    """A task's examples for a model."""

    def __init__(self, name: str, data: str, model: Any, tokenizer: Any, general: Any = None) -> None:
        self.task, self.model, self.tokenizer, self.general = get_task(name), model, tokenizer, general
        sizes = {"train_examples": TRAIN, "dev_examples": DEV, "test_examples": TEST.get(name, 600)}
        splits = load_splits(self.task, data_dir=str(Path(data) / name), **sizes)
        encoder = Encoder(tokenizer, LENGTH)
        self.splits = {split: encoder(self.task, found.examples) for split, found in splits.items()}
        self.layout = find_layout(model, tokenizer, self.splits["train"])
        self.batch = BATCH.get(name, 16)
        self.targets = [LATE_DOWN, *([LATE_ATTENTION] if self.task.free_text else [])]  # as train has it

    def batches(self, seed: int, steps: int) -> Any:
        """Minibatches of a walk."""
        train = self.splits["train"]
        labels = [example.label for example in train] if self.task.fixed_answers else [0] * len(train)
        order = chain.from_iterable(repeat(StratifiedSampler(labels, seed)))
        for _ in range(steps):
            yield prepare(self.model, self.tokenizer, [train[i] for i in islice(order, self.batch)], self.layout)

    def measure(self, model: Any, split: str) -> dict[str, float]:
        """Loss, and the metric where nothing is written for it."""
        how = {"batch_size": 16, "layout": self.layout, "loss_alone": self.task.free_text}
        return evaluate(model, self.tokenizer, self.task, self.splits[split], **how)


def walk(task: Task, model: Any, key: dict[str, Any]) -> dict[str, Any]:
    """One walk."""
    adapted = tune(
        model,
        task.tokenizer,
        "lora",
        lora_rank=key["rank"],
        lora_targets=task.targets,
        freeze_a=True,
        seed=key["seed"],
    )
    objective, dev = training_objective(task.task), []

    def watched() -> float:
        dev.append(task.measure(adapted, "dev"))
        return dev[-1]["loss"]

    began = time.process_time()
    batches = task.batches(key["seed"], key["steps"])
    lowered = WithPrompts(task.task, key["prompts"], key["seed"]) if key["prompts"] else None
    how = {"steps": key["steps"], "rate": key["rate"]}
    start_from_feedback(adapted, batches, objective, lowered=lowered, watched=watched, **how)
    seconds = time.process_time() - began
    row = {**key, "dev": dev, "test": task.measure(adapted, "test"), "processor_seconds": seconds}
    if task.general is not None:
        text, before = task.general
        row["general_text"] = compared(before, token_losses(adapted, task.tokenizer, text))
    adapted.unload()
    return json.loads(json.dumps(row))


def cosines(task: Task, model: Any) -> dict[str, Any]:
    """Of each layer the cosine of G with the gradient of B, over 12 minibatches of the untuned model: along the stream as it is, by the maps of 16 others, and by these of
    queries and values."""
    targets = [LATE_DOWN, LATE_ATTENTION]
    adapted = tune(model, task.tokenizer, "lora", lora_targets=targets, freeze_a=True, seed=0)
    objective, given = training_objective(task.task), list(task.batches(0, FOR_A + 12))
    with torch.no_grad():
        way, fed = _learned(adapted, given[:FOR_A], objective)
        walks = {
            "stream": _begun(adapted, given[0], objective, 1e-3, fed),
            "maps": _begun(adapted, given[0], objective, 1e-3, fed, way),
        }
    names = {module: name for name, module in adapted.named_modules()}
    layers = {
        "down": walks["maps"].layers,
        **{
            kind: [layer for block in walks["maps"].blocks for layer in block.layers if names[layer].endswith(kind)]
            for kind in ("q_proj", "v_proj")
        },
    }
    sums: dict[tuple[str, str], list[Any]] = {}
    for batch in given[FOR_A:]:
        b = {kind: [layer.lora_B["default"].weight for layer in own] for kind, own in layers.items()}
        every = [weight for own in b.values() for weight in own]
        true = iter(torch.autograd.grad(objective(adapted, batch).mean(), every))
        found = {("true", kind): [next(true) for _ in own] for kind, own in b.items()}
        for name, walk in walks.items():
            with torch.no_grad():
                _gradient(adapted, walk, batch, objective)
            found |= {
                (name, kind): [weight.grad for weight in own]
                for kind, own in b.items()
                if kind == "down" or walk.blocks
            }
        for key, gradients in found.items():
            sums[key] = [a + g for a, g in zip(sums.get(key, [0.0] * len(gradients)), gradients, strict=True)]
    numbers = [int(re.findall(r"\.(\d+)\.", names[layer])[0]) for layer in layers["down"]]
    of = {
        name if kind == "down" else kind: [
            round(float(torch.cosine_similarity(g.flatten(), t.flatten(), 0)), 3)
            for g, t in zip(own, sums["true", kind], strict=True)
        ]
        for (name, kind), own in sums.items()
        if name != "true"
    }
    adapted.unload()
    return {"layers": numbers, **of}


def main() -> None:
    """Walk what is missing, and print it."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--tasks", nargs="+", default=["sst2", "sst5"])
    options.add_argument("--rates", type=float, nargs="+", default=[8e-3])
    options.add_argument("--ranks", type=int, nargs="+", default=[8])
    options.add_argument("--steps", type=int, nargs="+", default=[100])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--prompts", type=float, nargs="+", default=[0.0], help="weights of the loss over prompts")
    options.add_argument("--general-text", help="how much of it is forgotten; packaged: the one in the package")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--output", default="feedback")
    options.add_argument(
        "--cosines", action="store_true", help="of the untuned model's directions with its gradients, in place of walks"
    )
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    path = HERE / "results" / f"{given.output}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16", device="cpu")
    if given.cosines:
        found = {name: cosines(Task(name, given.data, model, tokenizer), model) for name in given.tasks}
        print(json.dumps(found))
        write(given.output, found)
        return
    general = None
    if given.general_text is not None:
        text = read_general(given.general_text)
        general = text, token_losses(model, tokenizer, text)
    for name in given.tasks:
        task = Task(name, given.data, model, tokenizer, general)
        if not any(row["task"] == name and row["steps"] == 0 for row in rows):
            rows.append(
                {"task": name, "steps": 0, "dev": [task.measure(model, "dev")], "test": task.measure(model, "test")}
            )
            print(name, "untuned", rows[-1]["test"], flush=True)
        for seed in given.seeds:
            for rank, steps, rate, prompts in product(given.ranks, given.steps, given.rates, given.prompts):
                key = {"task": name, "rank": rank, "steps": steps, "rate": rate, "seed": seed, "prompts": prompts}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(walk(task, model, key))
                write(given.output, {"rows": rows})
                losses = " ".join(f"{dev['loss']:.3f}" for dev in rows[-1]["dev"])
                print(
                    *key.values(),
                    "dev",
                    losses,
                    "test",
                    rows[-1]["test"],
                    f"{rows[-1]['processor_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
