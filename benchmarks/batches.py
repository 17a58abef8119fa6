"""Wasted work removed: the loss of real batches as we compute it, against the unshared, padded evaluation with full logits.

    python benchmarks/batches.py --data-dir FOLDER [--tasks sst2 cb record] [--shots 16 32]

The folder holds the tasks' data as for ``forwardtune train --data-dir``. The embedded 135M model in bfloat16, batches of 16
training examples drawn at random (2 of ReCoRD). ``plain`` has a row for each example and option, padded to the longest, and computes a
logit row for every token. ``ours`` processes each prompt once for all its options, packs short examples into one row, and
computes logits for the answers' tokens alone. Both losses are compared before anything is timed. For SST-2 the whole step is
timed as well: ``reference`` is the published loop over the plain evaluation.

Then what all prompts begin with, processed once and processed with every prompt, in processor seconds: an evaluation of SST-2 examples
behind so many demonstrations (``--shots``), and the loss of a minibatch behind an instruction. ``--tasks`` without any does this alone.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from machine import parser, write
from published import EPS, reference_step
from timing import interleave

from forwardtune import MeZO
from forwardtune.evaluation import (
    evaluate,
    find_layout,
    plain_layout,
    prepare,
    training_objective,
    with_common_beginning,
)
from forwardtune.models import load_model
from forwardtune.tasks import Task, get_task, load_splits
from forwardtune.tasks.encoding import Encoded, Encoder

INSTRUCTION = "Below is a sentence from a film review. Say whether its author liked the film: the answer is great or terrible.\n\n"
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


def measure_common(model: Any, tokenizer: Any, data_dir: str, shots: Sequence[int]) -> dict[str, Any]:
    """Processor seconds with what all prompts begin with in every prompt (``apart``), and ``once``."""
    task, found = get_task("sst2"), {}
    told = replace(task, prompt=INSTRUCTION + task.prompt)
    split = load_splits(told, data_dir=data_dir, dev_examples=0, train_examples=48, test_examples=32)
    train = Encoder(tokenizer, 2048)(told, split["train"].examples)
    apart = find_layout(model, tokenizer, train)
    once, objective = with_common_beginning(model, tokenizer, train, apart), training_objective(task)
    rounds = []
    for lo in range(0, len(train), 16):
        inputs = {
            name: prepare(model, tokenizer, train[lo : lo + 16], layout)
            for name, layout in {"apart": apart, "once": once}.items()
        }
        works: dict[str, Callable[[], object]] = {
            name: torch.no_grad()(lambda batch=batch: objective(model, batch).mean()) for name, batch in inputs.items()
        }
        rounds.append(interleave(works, 3, clock=time.process_time))
    common = next(int(batch["common"]) for batch in inputs.values() if "common" in batch)
    found["instruction"] = {
        "common_tokens": common,
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in works},
        "speedup": statistics.median(one["apart"] / one["once"] for one in rounds),
        "tokens": {name: batch["input_ids"].numel() for name, batch in inputs.items()},
    }
    split = load_splits(task, data_dir=data_dir, dev_examples=0, train_examples=48, test_examples=32)
    for count in shots:
        encoder = Encoder(tokenizer, 2048, split["train"].examples[:count])
        examples = encoder(task, split["test"].examples)
        layout = find_layout(model, tokenizer, examples)

        def measured(examples: Sequence[Encoded] = examples, layout: Any = layout) -> float:
            return evaluate(model, tokenizer, task, examples, layout=layout)["loss"]

        def measured_apart(measured: Callable[[], float] = measured) -> float:
            with mock.patch("forwardtune.evaluation.common_beginning", return_value=[]):
                return measured()

        seconds = interleave({"apart": measured_apart, "once": measured}, 1, clock=time.process_time)
        found[f"shots-{count}"] = {
            "prompt_tokens": statistics.mean(len(e.prompt) for e in examples),
            "seconds": seconds,
            "speedup": seconds["apart"] / seconds["once"],
        }
    return found


def main() -> None:
    """Print and save the ratios."""
    asked = parser(__doc__)
    asked.add_argument("--data-dir", required=True)
    asked.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    asked.add_argument("--shots", nargs="*", type=int, default=[16, 32])
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
    common = measure_common(model, tokenizer, options.data_dir, options.shots)
    for name, found in common.items():
        print(
            f"{name:14}apart {found['seconds']['apart']:8.2f} s{'once':>8} {found['seconds']['once']:8.2f} s{found['speedup']:8.2f}"
        )
    write("batches-common", {"batch": 16, **common})


if __name__ == "__main__":
    main()
