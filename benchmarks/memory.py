"""Peak memory of a full-tuning step, against one inference forward and against backpropagation with Adam.

    python benchmarks/memory.py [--sizes 125m 1.3b] [--device cuda] [--length 32]

OPT-shaped models with random weights in bfloat16, batch 16. Every measurement is a process of its own: resident memory on a
CPU, allocated memory on a GPU. ``bound`` is the largest tuned layer, embeddings and vocabulary head left out: what a step may
take beyond inference. Adam holds two states of the weights' dtype and the gradient (AdamW of torch, bfloat16 throughout);
sizes that do not fit are left out and said so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from machine import write
from shapes import OPT, opt
from torch import nn

from forwardtune import MeZO, memory
from forwardtune.objectives import logits_at

BATCH, VOCABULARY = 16, 50272


def measure(what: str, size: str, device: str, length: int) -> dict[str, Any]:
    """Peak memory of one kind of work, in this process."""
    # What libraries load at their first use is not the model's.
    tiny = nn.Linear(64, 64).to(device)
    MeZO(tiny, lr=1e-3).step(lambda: tiny(torch.ones(1, 64, device=device)).sum())
    model = opt(size, torch.bfloat16, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, VOCABULARY, (BATCH, length), generator=generator).to(device)
    last = torch.arange(BATCH, device=device) * length + length - 1
    batch = {"input_ids": input_ids, "positions": last}

    def loss() -> torch.Tensor:
        return logits_at(model, batch).logsumexp(dim=-1).mean()

    with torch.no_grad():
        loss()
    memory.reset_peak(device)
    if what == "inference":
        with torch.no_grad():
            loss()
    elif what == "mezo":
        optimizer = MeZO(model, lr=1e-9, perturbation="scratch")
        for _ in range(2):
            optimizer.step(loss)
    else:
        adam = torch.optim.AdamW(model.parameters(), lr=1e-9, foreach=False)
        for _ in range(2):
            loss().backward()
            adam.step()
            adam.zero_grad()
    largest = max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not model.get_output_embeddings()
    )
    return {"peak": memory.peak(device), "weights": weights, "bound": largest}


def in_process(what: str, size: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The measurement of a process of its own; None if it ran out of memory."""
    arguments = ["--only", what, "--sizes", size, "--device", options.device, "--length", str(options.length)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{size} {what}: not measured ({(done.stderr.strip().splitlines() or ['killed'])[-1]:.100})")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=OPT, default=["125m", "350m", "1.3b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--only", choices=("inference", "mezo", "adam"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.sizes[0], options.device, options.length)))
        return
    rows = []
    print(f"{'size':6}{'inference':>12}{'MeZO':>12}{'more':>10}{'bound':>10}{'Adam':>12}   MiB")
    for size in options.sizes:
        found = {what: in_process(what, size, options) for what in ("inference", "mezo", "adam")}
        inference, mezo, adam = found["inference"], found["mezo"], found["adam"]
        if inference is None or mezo is None:
            continue
        row = {
            "size": size,
            "weights": mezo["weights"],
            "inference": inference["peak"],
            "mezo": mezo["peak"],
            "more": mezo["peak"] - inference["peak"],
            "bound": mezo["bound"],
            "adam": adam["peak"] if adam else None,
        }
        rows.append(row)
        mib = {key: (value or float("nan")) / 2**20 for key, value in row.items() if key != "size"}
        print(
            f"{size:6}{mib['inference']:12,.0f}{mib['mezo']:12,.0f}{mib['more']:10,.1f}{mib['bound']:10,.1f}"
            f"{mib['adam']:12,.0f}",
            flush=True,
        )
    write(f"memory-{options.device}", {"batch": [BATCH, options.length], "rows": rows})


if __name__ == "__main__":
    main()
