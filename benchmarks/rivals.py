"""MeZO against what else fits where memory is short: seconds a step, peak memory, and loss after equal seconds.

    python benchmarks/rivals.py --data FOLDER                        # everything; a second call goes on with what is missing
    python benchmarks/rivals.py --stages measure --workloads 1.1b --rounds 3
    python benchmarks/rivals.py --stages learn --data FOLDER --workloads sst2 --seconds 60

FOLDER holds ``sst2`` and ``squad`` with their train.jsonl and validation.jsonl. Workloads: SmolLM2-135M on minibatches of either, and a model of
TinyLlama-1.1B's shape with random weights on 16 x 64 random tokens, one logit row a sequence. All in bfloat16, 16 examples a minibatch.

``measure``: every method in a process of its own with one thread, all methods once a round. Memory is the most anonymous memory beyond what the process
held before the model was loaded, after a first round of everything on a tiny model. ``seconds`` are those of the processor, which other programs
on the machine do not lengthen as they do those of the clock, and ``forwards`` is the step over a forward pass without gradients of the
same minibatch, timed just before it. Medians over rounds are told.

``learn``: equal seconds are steps times measured seconds a step, so that other programs' load cancels. A method tries three rates for a quarter of
the time, and that with the lowest loss on development examples runs to the end; the loss on test examples at a quarter, a half and
the whole of the time is told. Methods whose steps move the weights alike share a curve.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import HERE, parser, write
from memory import PROMPT_RETURN
from rival_methods import DTYPE, METHODS, Watch, anonymous, load, stepper
from shapes import BATCH, LLAMA, losses_of, make, minibatch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, logging

from forwardtune.evaluation import find_layout, prepare, training_objective
from forwardtune.models import load_model
from forwardtune.objectives import logits_at
from forwardtune.tasks import get_task, load_splits
from forwardtune.tasks.encoding import Encoder

LENGTH, DEV, TEST, RATES, SHARES = 64, 64, 200, (10**-0.5, 1.0, 10**0.5), (0.25, 0.5, 1.0)
TINY = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
TASKS = ("sst2", "squad")
WORKLOADS = (*TASKS, *LLAMA)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
#: Processor seconds that the methods learn.
SECONDS = {"sst2": 60.0, "squad": 180.0}


class Examples:
    """Minibatches of a task, and the losses of a model on them."""

    def __init__(self, name: str, data: Path, model: Any, tokenizer: Any) -> None:
        self.task = get_task(name)
        splits = load_splits(self.task, data_dir=str(data / name), dev_examples=DEV, test_examples=TEST)
        encoder = Encoder(tokenizer, 512)
        self.splits = {name: encoder(self.task, split.examples) for name, split in splits.items()}
        self.tokenizer, self.layout = tokenizer, find_layout(model, tokenizer, self.splits["train"])

    def batch(self, model: Any, seed: int) -> dict[str, Tensor]:
        train, draw = self.splits["train"], torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train), generator=draw)[:BATCH].tolist()
        return prepare(model, self.tokenizer, [train[i] for i in chosen], self.layout)

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: training_objective(self.task)(model, batch)

    @torch.no_grad()
    def mean_loss(self, model: Any, split: str) -> float:
        """Over a split, with the model as it computes when it is used."""
        was, examples = model.training, sorted(self.splits[split], key=lambda example: example.length)
        model.eval()
        losses = [
            self.losses(model, prepare(model, self.tokenizer, examples[i : i + 25], self.layout))()
            for i in range(0, len(examples), 25)
        ]
        model.train(was)
        return float(torch.cat(losses).mean())


def measure(name: str, workload: str, folder: Path, data: Path) -> dict[str, Any]:
    """Memory and time of a method, in this process."""
    method = METHODS[name]
    tiny, _ = load(method, folder / "tiny")
    step = stepper(method, tiny, 1e-9)
    for _ in range(2):
        step(losses_of(tiny, minibatch(tiny, 8)))
    del tiny, step
    before = anonymous()
    model, tokenizer = load(method, folder)
    if workload in TASKS:
        examples = Examples(workload, data, model, tokenizer)
        batch = examples.batch(model, 0)
        losses = examples.losses(model, batch)
    else:
        batch = minibatch(model, LENGTH)
        losses = losses_of(model, batch)
    step = stepper(method, model, 1e-9)
    with Watch() as watch:
        step(losses)
        step(losses)
    began = time.process_time()
    with torch.no_grad():
        logits_at(model, batch)
    between = time.process_time()
    step(losses)
    seconds = time.process_time() - between
    tokens = batch["input_ids"].numel()
    return {
        "bytes": watch.peak - before,
        "seconds": seconds,
        "forwards": seconds / (between - began),
        "tokens": tokens,
    }


def learn(
    name: str, workload: str, folder: Path, data: Path, lr: float, marks: list[int], split: str
) -> dict[str, Any]:
    """Losses on a split after so many steps."""
    method = METHODS[name]
    model, tokenizer = load(method, folder)
    examples = Examples(workload, data, model, tokenizer)
    torch.manual_seed(0)
    step, losses = stepper(method, model, lr), {}
    for number in range(max(marks) + 1):
        if number in marks:
            losses[number] = examples.mean_loss(model, split)
        if number < max(marks):
            step(examples.losses(model, examples.batch(model, number)))
    return {"losses": losses}


def prepare_folder(workload: str, folder: Path) -> None:
    """The workload's model as a checkpoint, and a tiny one in it."""
    LlamaForCausalLM(TINY).to(DTYPE).save_pretrained(folder / "tiny")
    if workload in TASKS:
        model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
        tokenizer.save_pretrained(folder)
    else:
        model = make(workload, DTYPE)
    model.save_pretrained(folder)


def in_process(*arguments: object) -> dict[str, Any]:
    """What a process of its own prints; nothing if it failed, as it does where memory is short."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | PROMPT_RETURN | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(f"{' '.join(map(str, arguments))}: exit code {done.returncode}", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else {}


def medians(rows: list[dict[str, Any]], workload: str) -> dict[str, dict[str, float]]:
    """What the rounds of a workload measured, by method."""
    found = {}
    for name in METHODS:
        own = [row for row in rows if (row["workload"], row["method"]) == (workload, name)]
        if own:
            found[name] = {
                key: statistics.median(row[key] for row in own) for key in ("bytes", "seconds", "forwards", "tokens")
            }
    return found


def measure_all(options: argparse.Namespace, result: dict[str, Any], workload: str, folder: Path) -> None:
    rows = result["measured"]
    for number in range(options.rounds):
        for name in options.methods:
            key = {"workload": workload, "method": name, "round": number}
            if any(key.items() <= row.items() for row in rows):
                continue
            row = in_process("--only", "measure", *_named(options, name, workload, folder))
            if row:
                rows.append({**key, **row})
                write("rivals", result)
                print(
                    f"{workload:14}{name:18}{row['bytes'] / 2**20:10,.0f} MiB{row['seconds']:8.2f} s {row['forwards']:7.2f} forwards",
                    flush=True,
                )


def learn_all(options: argparse.Namespace, result: dict[str, Any], workload: str, folder: Path) -> None:
    """Every curve of a task, scan first, and then the loss of every method after equal seconds."""
    measured, rows = medians(result["measured"], workload), result["learnt"]
    seconds = options.seconds or SECONDS[workload]

    def curve(name: str, lr: float, marks: list[int], split: str) -> dict[int, float]:
        key = {"workload": workload, "method": name, "lr": float(f"{lr:.1e}"), "split": split}
        old = next((row for row in rows if key.items() <= row.items()), None)
        if old is None or not {str(mark) for mark in marks} <= old["losses"].keys():
            numbers = json.dumps(sorted({*marks, *(int(mark) for mark in (old or {"losses": ()})["losses"])}))
            named = _named(options, name, workload, folder)
            row = in_process("--only", "learn", *named, "--lr", key["lr"], "--marks", numbers, "--split", split)
            if not row:
                return {}
            if old is not None:
                rows.remove(old)
            rows.append(old := {**key, **row})
            write("rivals", result)
            last = list(old["losses"].items())[-1]
            print(f"{workload:8}{name:18} lr {lr:.0e} {split}: {last[1]:.3f} after {last[0]} steps", flush=True)
        return {int(mark): loss for mark, loss in old["losses"].items()}

    for name in options.methods:
        if name not in measured or METHODS[name].learns_as not in (None, name):
            continue
        alike = [other for other in measured if name in (other, METHODS[other].learns_as)]
        marks = {m: [max(1, math.floor(share * seconds / measured[m]["seconds"])) for share in SHARES] for m in alike}
        scan = marks[name][0]
        ended = {lr: curve(name, lr, [scan], "dev").get(scan, math.nan) for lr in (METHODS[name].lr * r for r in RATES)}
        best = min(ended, key=lambda lr: ended[lr] if math.isfinite(ended[lr]) else math.inf)
        losses = curve(name, best, sorted({0}.union(*marks.values())), "test")
        for m in alike:
            key = {"workload": workload, "method": m}
            result["equal"] = [row for row in result["equal"] if not key.items() <= row.items()]
            result["equal"].append(
                {
                    **key,
                    "lr": best,
                    "seconds": [share * seconds for share in SHARES],
                    "steps": marks[m],
                    "losses": [losses.get(mark) for mark in marks[m]],
                    "before": losses.get(0),
                }
            )
        write("rivals", result)


def _named(options: argparse.Namespace, name: str, workload: str, folder: Path) -> list[object]:
    named = ["--methods", name, "--workloads", workload, "--folder", folder]
    return [*named, "--data", options.data] if options.data else named


def main() -> None:
    """Run what is missing, and print it."""
    asked = parser(__doc__)
    asked.add_argument("--data", type=Path, help="folder with sst2 and squad")
    asked.add_argument("--stages", nargs="+", choices=("measure", "learn"), default=["measure", "learn"])
    asked.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["sst2", "squad", "1.1b"])
    asked.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--seconds", type=float, help="of learning [60 on SST-2, 180 on SQuAD]")
    asked.add_argument("--only", choices=("make", "measure", "learn"), help=argparse.SUPPRESS)
    asked.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    asked.add_argument("--marks", type=json.loads, help=argparse.SUPPRESS)
    asked.add_argument("--split", help=argparse.SUPPRESS)
    options = asked.parse_args()
    torch.set_num_threads(1)
    if options.only:
        logging.disable_progress_bar()
        one = (options.methods[0], options.workloads[0], options.folder, options.data)
        if options.only == "make":
            prepare_folder(options.workloads[0], options.folder)
        elif options.only == "measure":
            print(json.dumps(measure(*one)))
        else:
            print(json.dumps(learn(*one, options.lr, options.marks, options.split)))
        return
    if options.data is None and set(options.workloads) & set(TASKS):
        asked.error("--data FOLDER is needed for sst2 and squad")
    path = Path(os.environ.get("FORWARDTUNE_RESULTS") or HERE / "results") / "rivals.json"
    result: dict[str, Any] = {"measured": [], "learnt": [], "equal": []}
    if path.exists():
        result |= {key: value for key, value in json.loads(path.read_text()).items() if key in result}
    for workload in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            in_process("--only", "make", "--workloads", workload, "--folder", folder)
            if "measure" in options.stages:
                measure_all(options, result, workload, Path(folder))
            if "learn" in options.stages and workload in TASKS:
                learn_all(options, result, workload, Path(folder))


if __name__ == "__main__":
    main()
