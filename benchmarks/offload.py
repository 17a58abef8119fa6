"""Full tuning with the weights in a file: memory of a model that is larger than it, bits and time of one that fits.

    python benchmarks/offload.py                              # both parts; 27 GiB of disk for some minutes, in --folder
    python benchmarks/offload.py --parts small                # bits and time alone; each part has a file of results
    python benchmarks/offload.py --parts large --size 1.3b    # memory of a smaller shape
    python benchmarks/offload.py --parts gpu --sizes 1.3b 13b # on a GPU: weights in the host's memory beside a GPU, against weights on it

``large``: a checkpoint of OPT's shape, random bfloat16 weights written layer by layer, is loaded with its weights left on disk, moves into
a private file (and is removed), and takes full-tuning steps on 2 x 8 tokens. Anonymous resident memory is read all the while: what the
process itself holds, libraries included, without the file's pages, which the system takes back where memory is short. ``beyond`` is its
peak in a step without what the process held before it loaded anything, and without one layer; it is negative where a step holds less than
a layer, as one module of it is perturbed at a time.

``small``: SmolLM2-135M in bfloat16, 8 x 32 tokens, resident and from a file, in turn, in one process. The file is in the page cache, so a
step waits for nothing, and seconds of the processor are compared: others on the machine do not count.

``gpu``: OPT's shapes in bfloat16, 16 x 64 tokens (``--length``), on the GPU, then with the weights pinned in the host's memory, then in a file,
of which the host's page cache may hold as much as there is room for. Seconds are
medians: ``walks`` of the two forward passes of a step, ``update`` of moving the weights, ``step`` of both. ``peak`` is of what is allocated on
the GPU. The losses of all steps have to be the same. ``gigabytes_a_second`` are the weights over those seconds, as often as they cross the bus towards
the GPU: twice in the walks, once in the update, which also brings them back. Rounds end early when they have taken ``_SECONDS``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import parser, write
from safetensors.torch import save_file
from shapes import OPT, _opt, loss_of, make, minibatch, size_of
from transformers import AutoModelForCausalLM, OPTForCausalLM

from forwardtune import MeZO, memory
from forwardtune.models import load_model
from forwardtune.storage import InHostMemory, OnDisk

GIB = 2**30
STEPS = 2
HOMES = ("resident", "host", "file")
_SECONDS, _ROUNDS = 6.0, 3  # of rounds beside a GPU: they end after so long, but are so many at least
# A sentence for each row of the small model's minibatch.
TEXT = "The capital of a country is where its government sits, as a rule, and often its largest city, but not in all of them."


@contextmanager
def watched(peaks: dict[str, int], name: str) -> Iterator[None]:
    """Keeps the largest anonymous resident memory of this process during the block."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            peaks[name] = max(peaks.get(name, 0), anonymous())

    watcher = threading.Thread(target=look, daemon=True)
    peaks[name] = anonymous()
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def anonymous() -> int:
    """Bytes of anonymous resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def write_checkpoint(size: str, folder: Path) -> None:
    """Random weights of that shape, a file for each decoder layer and one for the rest."""
    config = _opt(size)
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    generator, files = torch.Generator().manual_seed(0), {}
    shards: dict[str, list[str]] = {}
    for name in dict(model.named_parameters()):
        parts = name.split(".layers.")
        shards.setdefault(parts[1].split(".")[0] if len(parts) > 1 else "rest", []).append(name)
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                tensors[name].fill_(1)
        files |= dict.fromkeys(names, f"model-{shard}.safetensors")
        save_file(tensors, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def large(size: str, folder: Path) -> dict[str, Any]:
    """Memory and seconds of full-tuning steps of a shape, in this process."""
    peaks: dict[str, int] = {}
    tiny = torch.nn.Linear(64, 64).to(torch.bfloat16)
    MeZO(tiny, lr=1e-3).step(lambda: tiny(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum())  # kernels are loaded
    before = anonymous()
    checkpoint = folder / "checkpoint"
    with watched(peaks, "load"):
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=folder / "converted"
        ).eval()
        optimizer = MeZO(model, lr=1e-7, storage=OnDisk(folder))
        seconds = {"load": time.perf_counter() - began}
    shutil.rmtree(checkpoint)
    batch = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in ("first_step", *(f"step_{i}" for i in range(2, STEPS + 1))):
        with watched(peaks, step):
            began = time.perf_counter()
            losses.append(optimizer.step(lambda: model(input_ids=batch, labels=batch).loss))
            seconds[step] = time.perf_counter() - began
        print(step, f"{seconds[step]:.0f} s", f"{peaks[step] / GIB:.2f} GiB anonymous", file=sys.stderr, flush=True)
    layer = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in model.model.decoder.layers)
    peak = max(value for name, value in peaks.items() if name != "load")
    assert optimizer.perturbation is not None
    return {
        "size": size,
        "weights": size_of(model),
        "layer": layer,
        "perturbation": optimizer.perturbation.name,
        "anonymous_before": before,
        "anonymous_peaks": peaks,
        "beyond": peak - before - layer,
        "beyond_with_libraries": peak - layer,
        "losses": losses,
        "seconds": seconds,
    }


def small(folder: Path, rounds: int) -> dict[str, Any]:
    """Bits of the 135M model, and medians of the seconds that the processor works on a step."""
    runs = {}
    for home, storage in {"resident": None, "file": OnDisk(folder)}.items():
        model, tokenizer = load_model("smollm2-135m", dtype="bfloat16", storage=storage)
        batch = tokenizer([TEXT] * 8, return_tensors="pt", max_length=32, truncation=True, padding="max_length")
        batch["labels"] = batch["input_ids"]
        optimizer = MeZO(model, lr=1e-6)
        runs[home] = (optimizer, lambda model=model, batch=batch: model(**batch).loss)
    for optimizer, closure in runs.values():
        optimizer.step(closure)
    seconds: dict[str, list[float]] = {home: [] for home in runs}
    for _ in range(rounds):
        for home, (optimizer, closure) in runs.items():
            began = time.process_time()
            optimizer.step(closure)
            seconds[home].append(time.process_time() - began)
    medians = {home: statistics.median(each) for home, each in seconds.items()}
    digests = {home: optimizer.tuned.digest() for home, (optimizer, _) in runs.items()}
    return {
        "steps": rounds + 1,
        "digests": digests,
        "same_bits": len(set(digests.values())) == 1,
        "processor_seconds": medians,
        "ratio": medians["file"] / medians["resident"],
    }


def on_gpu(size: str, rounds: int, length: int, homes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Seconds, memory and losses of full-tuning steps, with the weights on the device, in the host's memory, and in a file."""
    row: dict[str, Any] = {"size": size, "length": length, "ratio": {}, "gigabytes_a_second": {}}
    losses: dict[str, list[float]] = {}
    storages: dict[str, Callable[[], Any]] = {
        "resident": lambda: None,
        "host": lambda: InHostMemory("cuda"),
        "file": lambda: OnDisk(folder, "cuda"),
    }
    for home in homes:
        storage = storages[home]()
        model = make(size, torch.bfloat16, "cuda")
        row["weights"] = size_of(model)
        began = time.perf_counter()
        optimizer = MeZO(model, lr=1e-7, storage=storage)
        placed = time.perf_counter() - began
        gc.collect()
        torch.cuda.empty_cache()
        loss = loss_of(model, minibatch(model, length, "cuda"))
        taken = losses[home] = [optimizer.step(loss)]
        memory.reset_peak("cuda")
        seconds = seconds_of_steps(optimizer, loss, rounds, taken)
        assert optimizer.perturbation is not None
        row[home] = {
            "placed": placed, "seconds": seconds, "peak": memory.peak("cuda"), "perturbation": optimizer.perturbation.name
        }  # fmt: skip
        print(size, home, row[home], flush=True)
        del model, optimizer, loss
        gc.collect()
        torch.cuda.empty_cache()
    least = min(map(len, losses.values()))
    row["same_losses"] = len({tuple(own[:least]) for own in losses.values()}) == 1
    row["losses"] = losses
    for home in homes[1:]:
        seconds, base = row[home]["seconds"], row[homes[0]]["seconds"]
        row["ratio"][home] = {part: seconds[part] / base[part] for part in seconds}
        row["gigabytes_a_second"][home] = {
            part: times * row["weights"] / seconds[part] / 1e9 for part, times in (("walks", 2), ("update", 1))
        }
    return row


def seconds_of_steps(optimizer: MeZO, loss: Any, rounds: int, taken: list[float]) -> dict[str, float]:
    """Medians of the parts of a step on a GPU. Its losses are added to those that were taken."""
    seconds: dict[str, list[float]] = {"step": [], "walks": [], "update": []}
    while len(seconds["step"]) < rounds and (len(seconds["step"]) < _ROUNDS or sum(seconds["step"]) < _SECONDS):
        torch.cuda.synchronize()
        times = [time.perf_counter()]
        for work in (lambda: optimizer.estimate(loss), lambda: taken.append(optimizer.apply())):
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter())
        for part, (since, until) in {"walks": (0, 1), "update": (1, 2), "step": (0, 2)}.items():
            seconds[part].append(times[until] - times[since])
    return {part: statistics.median(each) for part, each in seconds.items()}


def in_process(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The large part, in a process of its own."""
    arguments = ["--only", str(folder), "--size", options.size]
    # The C library is told to give memory back: what is measured is memory in use.
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=os.environ | prompt, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print and save."""
    asked = parser(__doc__)
    asked.add_argument("--parts", nargs="+", choices=("small", "large", "gpu"), default=["small", "large"])
    asked.add_argument("--size", choices=OPT, default="6.7b")
    asked.add_argument("--sizes", nargs="+", choices=OPT, default=["1.3b", "13b"], help="of the part for a GPU")
    asked.add_argument(
        "--homes",
        nargs="+",
        choices=HOMES,
        default=HOMES,
        help="of the part for a GPU; the first one is what others are measured by",
    )
    asked.add_argument("--length", type=int, default=64, help="tokens of a sequence, of the part for a GPU")
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--folder", help="on a disk with room for the model twice [here]", default=".")
    asked.add_argument("--output", default="offload")
    asked.add_argument("--only", help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.only:
        print(json.dumps(large(options.size, Path(options.only))))
        return
    if "gpu" in options.parts:
        rows = []
        for size in options.sizes:
            with tempfile.TemporaryDirectory(dir=options.folder, prefix="offload-") as there:
                rows.append(on_gpu(size, options.rounds, options.length, options.homes, Path(there)))
            write(f"{options.output}-gpu", {"rows": rows})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="offload-") as folder:
        if "small" in options.parts:
            result = small(Path(folder), options.rounds)
            print(json.dumps(result, indent=2))
            write(f"{options.output}-small", result)
        if "large" in options.parts:
            (Path(folder) / "checkpoint").mkdir()
            write_checkpoint(options.size, Path(folder) / "checkpoint")
            result = in_process(options, Path(folder))
            print(json.dumps(result, indent=2))
            write(f"{options.output}-large", result)


if __name__ == "__main__":
    main()
