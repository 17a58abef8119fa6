"""Peak memory over a quantised model: a forward pass, and a step that tunes LoRA beside it, as it is stored or quantised as it is loaded.

    python benchmarks/quantised.py [--sizes smollm2-135m 1.1b] [--kinds bfloat16 int8 nf4 int4] [--length 8]

Checkpoints of the shapes of SmolLM2-135M and TinyLlama-1.1B with random weights in bfloat16; batch 16, one logit row a sequence, LoRA of rank 8
on query and value projections. Every row is measured in a process of its own, beyond what that process held before the model was loaded and after a
first round of everything on a tiny model, so that neither pays for its libraries. ``stored`` are the bytes of all tensors of the model,
``inference`` is the peak of a forward pass, ``step`` that of a step of MeZO, ``more`` what the step takes beyond the pass, and ``seconds`` its time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import parser, write
from memory import PROMPT_RETURN
from shapes import BATCH, loss_of, make, minibatch
from timing import peak_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from forwardtune import MeZO, memory
from forwardtune.models import tune
from forwardtune.models.quantised import keep_as_stored, let_go_of_file, quantisation
from forwardtune.parameters import _stored

TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DTYPE = torch.bfloat16


def load(folder: Path, kind: str) -> Any:
    """The checkpoint with LoRA to be tuned."""
    how = {} if kind == "bfloat16" else {"quantization_config": quantisation(kind, DTYPE, "cpu")}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, device_map={"": "cpu"}, **how)
    keep_as_stored(model)
    if how:
        let_go_of_file(model)
    return tune(model, None, "lora")


def measure(folder: Path, kind: str, length: int) -> dict[str, Any]:
    """One row, in this process."""
    logging.disable_progress_bar()
    _round(load(folder / "tiny", kind), 8)
    before = memory.now()
    model = load(folder, kind)
    loss, optimizer = loss_of(model, minibatch(model, length)), MeZO(model, lr=1e-9)
    with torch.no_grad():
        loss()
        inference = peak_of(loss, "cpu")
        optimizer.step(loss)
        began = time.perf_counter()
        step = peak_of(lambda: optimizer.step(loss), "cpu")
    tensors = [part for name, t in model.state_dict().items() for _, part in _stored(name, t)]
    different = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return {
        "stored": sum(different.values()),
        "inference": inference - before,
        "step": step - before,
        "more": step - inference,
        "seconds": time.perf_counter() - began,
    }


def _round(model: Any, length: int) -> None:
    loss, optimizer = loss_of(model, minibatch(model, length)), MeZO(model, lr=1e-9)
    for _ in range(2):
        optimizer.step(loss)


def in_process(*arguments: str) -> dict[str, Any]:
    """The row that a process of its own measures."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | PROMPT_RETURN,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def main() -> None:
    """Print and save the table."""
    asked = parser(__doc__)
    asked.add_argument("--sizes", nargs="+", choices=("smollm2-135m", "1.1b"), default=["smollm2-135m", "1.1b"])
    asked.add_argument("--kinds", nargs="+", default=["bfloat16", "int8", "nf4", "int4"])
    asked.add_argument("--length", type=int, default=8)
    asked.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked.add_argument("--only", help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.only == "make":
        make(options.sizes[0], DTYPE).save_pretrained(options.folder)
        LlamaForCausalLM(LlamaConfig(**TINY, **HEADS)).to(DTYPE).save_pretrained(options.folder / "tiny")
        return
    if options.only:
        print(json.dumps(measure(options.folder, options.only, options.length)))
        return
    rows, titles = [], ("stored", "inference", "step", "more")
    print(f"{'size':14}{'kind':10}" + "".join(f"{title:>11}" for title in titles) + "  MiB  seconds")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--folder", folder, "--sizes", size, "--length", str(options.length)]
            in_process(*own, "--only", "make")
            for kind in options.kinds:
                row = in_process(*own, "--only", kind)
                rows.append({"size": size, "kind": kind, "batch": [BATCH, options.length], **row})
                figures = "".join(f"{row[title] / 2**20:11,.1f}" for title in titles)
                print(f"{size:14}{kind:10}{figures}{row['seconds']:14.2f}", flush=True)
                write("quantised", {"rows": rows})


if __name__ == "__main__":
    main()
