"""Peak memory of a full-tuning step, against one inference forward and against backpropagation with Adam.

    python benchmarks/memory.py [--sizes 125m 1.3b] [--dtypes bfloat16] [--device cuda] [--length 32]
    python benchmarks/memory.py --sizes lfm2-350m mamba-130m --length 8 --output memory-hybrids

OPT-shaped models and hybrids with random weights, batch 16, every weight tuned, one logit row a sequence. MeZO and Adam run in processes of
their own: resident memory on a CPU, allocated memory on a GPU. ``more`` is the peak of a step over the peak of a forward pass
of the same batch, both in the same process and after a first round of each, so that neither pays for what libraries load and
cache at their first use; ``first`` is the same of the first step, self-check included. ``bound`` is the largest tuned
layer, embeddings and vocabulary head left out. ``copied`` are the weights that the model reads past their modules, and which are perturbed
as a whole in memory of their own: none of OPT, the convolutions of hybrids.

Adam is torch's AdamW with gradient and states in the weights' dtype. What would not fit into the memory that is free beside
``--reserve`` is not tried: ``adam_at_least`` is then four times the weights, by arithmetic.

On a CPU the C library keeps freed memory for later, how much depends on the order of calls. The processes tell it to return blocks
of 64 KiB and more at once: what is measured is memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import parser, write
from shapes import BATCH, DTYPES, HYBRIDS, OPT, bytes_of, largest_layer, loss_of, make, minibatch, size_of
from timing import peak_of
from torch import nn

from forwardtune import MeZO

PROMPT_RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
# What a process holds beside the model: libraries, activations of 512 tokens, logits.
BESIDE = 3 << 30


def measure(what: str, size: str, dtype: torch.dtype, device: str, length: int) -> dict[str, Any]:
    """Peak memory of one method, in this process."""
    warm_up(dtype, device)
    model = make(size, dtype, device)
    loss = loss_of(model, minibatch(model, length, device))
    if what == "adam":
        adam = torch.optim.AdamW(model.parameters(), lr=1e-9, foreach=False)

        def step() -> None:
            loss().backward()
            adam.step()
            adam.zero_grad()

        return {"adam": max(peak_of(step, device) for _ in range(2))}
    with torch.no_grad():
        loss()
        inference = peak_of(loss, device)
        optimizer = MeZO(model, lr=1e-9)
        first = peak_of(lambda: optimizer.step(loss), device)
        mezo = peak_of(lambda: optimizer.step(loss), device)
    assert optimizer.perturbation is not None
    return {
        "perturbation": optimizer.perturbation.name,  # not scratch: the self-check found something
        "weights": size_of(model),
        "bound": largest_layer(model),
        "copied": sum(optimizer.tuned[i].parameter.nbytes for i in optimizer.evaluator.copied),
        "inference": inference,
        "mezo": mezo,
        "more": mezo - inference,
        "first": first - inference,
    }


def warm_up(dtype: torch.dtype, device: str) -> None:
    """What libraries load at their first use is not the model's: every kernel runs once, on a model of a few weights."""
    embedding, linear = nn.Embedding(8, 64), nn.Linear(64, 8)
    tiny = nn.Sequential(embedding, linear).to(device, dtype)
    numbers = torch.arange(8, device=device)
    MeZO(tiny, lr=1e-3).step(lambda: tiny(numbers).float().logsumexp(dim=-1).sum())
    tiny(numbers).sum().backward()


def in_process(what: str, size: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The measurement of a process of its own; nothing if memory is short."""
    weights = bytes_of(size, DTYPES[dtype])
    needed = weights * (4 if what == "adam" else 1) + BESIDE
    if needed > free(options.device) - options.reserve * 2**30:
        print(f"{size} {dtype} {what}: needs about {needed / 2**30:.0f} GiB, which are not free", file=sys.stderr)
        return {"adam": None, "adam_at_least": 4 * weights} if what == "adam" else {}
    arguments = ["--only", what, "--sizes", size, "--dtypes", dtype]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--device", options.device, "--length", str(options.length)],
        env=os.environ | PROMPT_RETURN,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"{size} {dtype} {what}: failed with exit code {done.returncode}", file=sys.stderr)
        options.failed = True
        return {"adam": None, "adam_at_least": 4 * weights} if what == "adam" else {}
    return json.loads(done.stdout.splitlines()[-1])


def free(device: str) -> int:
    """Bytes of memory that are not in use."""
    if torch.device(device).type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def main() -> None:
    """Print and save the table."""
    asked = parser(__doc__)
    asked.add_argument("--sizes", nargs="+", choices=(*OPT, *HYBRIDS), default=["125m", "350m", "1.3b", "2.7b"])
    asked.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    asked.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked.add_argument("--length", type=int, default=32)
    asked.add_argument("--reserve", type=float, default=1.0, help="GiB to leave to others")
    asked.add_argument("--output", help="name of the result file; memory, or memory-cuda on a GPU")
    asked.add_argument("--only", choices=("mezo", "adam"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    options.failed = False
    if options.only:
        dtype = DTYPES[options.dtypes[0]]
        print(json.dumps(measure(options.only, options.sizes[0], dtype, options.device, options.length)))
        return
    rows = []
    titles = ("inference", "mezo", "more", "first", "bound", "copied", "adam")
    print(f"{'size':12}{'dtype':10}" + "".join(f"{title:>12}" for title in titles) + "   MiB")
    for size in options.sizes:
        for dtype in options.dtypes:
            mezo = in_process("mezo", size, dtype, options)
            if not mezo:
                continue
            row = {
                "size": size,
                "dtype": dtype,
                "batch": [BATCH, options.length],
                **mezo,
                **in_process("adam", size, dtype, options),
            }
            rows.append(row)
            print(
                f"{size:12}{dtype:10}" + "".join(f"{(row[title] or float('nan')) / 2**20:12,.1f}" for title in titles),
                flush=True,
            )
            write(options.output or ("memory" if options.device == "cpu" else "memory-cuda"), {"rows": rows})
    sys.exit(options.failed)


if __name__ == "__main__":
    main()
