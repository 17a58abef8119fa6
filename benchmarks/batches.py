"""Wasted work removed: the loss of real batches as we compute it, against the unshared, padded evaluation with full logits.

    python benchmarks/batches.py --data-dir FOLDER [--tasks sst2 cb record]

The folder holds the tasks' data as for ``forwardtune train --data-dir``. The embedded 135M model in bfloat16, batches of 16
training examples drawn at random (2 of ReCoRD). ``plain`` has a row for each example and option, padded to the longest, and computes a
logit row for every token. ``ours`` processes each prompt once for all its options, packs short examples into one row, and
computes logits for the answers' tokens alone. Both losses are compared before anything is timed. For SST-2 the whole step is
timed as well: ``reference`` is the published loop over the plain evaluation.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from machine import parser, write
from published import EPS, reference_step
from timing import interleave

from forwardtune import MeZO
from forwardtune.evaluation import find_layout, plain_layout, prepare, training_objective
from forwardtune.models import load_model
from forwardtune.tasks import Task, get_task, load_splits
from forwardtune.tasks.encoding import Encoded, Encoder

# examples in a batch, batches, rounds: ReCoRD's plain evaluation has a row of hundreds of tokens for each of many entities
TASKS = {"sst2": (16, 4, 3), "cb": (16, 4, 3), "record": (2, 2, 1)}


@torch.no_grad()
def plain_loss(model: Any, task: Task, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss with logits for every token of every row."""
    logits = model(input_ids=inputs["input_ids"], use_cache=False).logits.float()
    log_p = logits.log_softmax(dim=-1).flatten(0, 1)
    at = inputs["positions"][inputs["logit_rows"]]
    scores = torch.zeros(int(inputs["slots"].max()) + 1).index_add(0, inputs["slots"], log_p[at, inputs["tokens"]])
    scores = (scores / inputs["slots"].bincount())[inputs["options"].clamp(min=0)]
    scores = scores.masked_fill(inputs["options"] < 0, float("-inf"))
    if task.loss == "likelihood":
        return -scores.gather(1, inputs["labels"][:, None]).mean()
    return F.cross_entropy(scores, inputs["labels"])


def measure(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Encoded], size: tuple[int, int, int], with_step: bool
) -> dict[str, Any]:
    """Medians over batches of the seconds of both evaluations, and of both steps."""
    layout, plain = find_layout(model, tokenizer, examples), plain_layout(model, tokenizer)
    objective, draw = training_objective(task), random.Random(0)
    optimizer = MeZO(model, lr=1e-12, eps=EPS)
    rounds: list[dict[str, float]] = []
    sizes: dict[str, list[int]] = {"plain": [], "ours": []}
    batch_size, batches, repeats = size
    for _ in range(batches):
        batch = draw.sample(list(examples), batch_size)
        inputs = {"plain": prepare(model, tokenizer, batch, plain), "ours": prepare(model, tokenizer, batch, layout)}

        @torch.no_grad()
        def ours(inputs: dict[str, Any] = inputs["ours"]) -> torch.Tensor:
            return objective(model, inputs).mean()

        def theirs(inputs: dict[str, Any] = inputs["plain"]) -> torch.Tensor:
            return plain_loss(model, task, inputs)

        # bfloat16 keeps 8 bits; losses are means of many numbers of size 1 to 10.
        torch.testing.assert_close(ours(), theirs(), rtol=0.02, atol=0.02)
        works: dict[str, Callable[[], object]] = {"plain": theirs, "ours": ours}
        if with_step:
            works["step"] = lambda ours=ours: optimizer.step(ours)
            works["reference"] = lambda theirs=theirs: reference_step(model, theirs, 1e-12, 0)
        rounds.append(interleave(works, repeats))
        for name, prepared in inputs.items():
            sizes[name].append(prepared["input_ids"].numel())
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    used = sum(e.length for e in examples) / len(examples) * batch_size
    return {
        "seconds": seconds,
        "speedup": statistics.median(r["plain"] / r["ours"] for r in rounds),
        "tokens": {name: statistics.mean(values) for name, values in sizes.items()},
        "tokens_needed": used,
        **({"step_speedup": statistics.median(r["reference"] / r["step"] for r in rounds)} if with_step else {}),
    }


def main() -> None:
    """Print and save the ratios."""
    asked = parser(__doc__)
    asked.add_argument("--data-dir", required=True)
    asked.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = asked.parse_args()
    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
    print(f"{'task':8}{'tokens plain':>14}{'ours':>8}{'needed':>8}{'plain / ours':>14}{'reference step / step':>24}")
    for name in options.tasks:
        task = get_task(name)
        split = load_splits(task, data_dir=options.data_dir, dev_examples=0, train_examples=200, only=["train"])[
            "train"
        ]
        examples = Encoder(tokenizer, 1024)(task, split.examples)
        row = measure(model, tokenizer, task, examples, TASKS[name], name == "sst2")
        print(
            f"{name:8}{row['tokens']['plain']:14.0f}{row['tokens']['ours']:8.0f}{row['tokens_needed']:8.0f}"
            f"{row['speedup']:14.2f}{row.get('step_speedup', float('nan')):24.2f}",
            flush=True,
        )
        write(f"batches-{name}", {"batch": TASKS[name][0], **row})


if __name__ == "__main__":
    main()
