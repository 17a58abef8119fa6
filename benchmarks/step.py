"""Seconds of a full-tuning step, against its floor of two forward passes and against the published loop.

    python benchmarks/step.py                     # the shape of SmolLM2-135M, 16 x 32, bfloat16 and float32, on a CPU
    python benchmarks/step.py --device cuda       # OPT's shapes, 16 x 32, 64 and 400, bfloat16; with their memory
    python benchmarks/step.py --shapes 125m --lengths 32 --rounds 2 --output smoke
    python benchmarks/step.py --device cuda --shapes 1.3b --lengths 64 --profile --output profile-cuda   # what takes the time

``example`` is a step in which every example has a direction of its own, on the side path; its two forwards are timed by themselves as well.
``both`` is the same with both sides of a probe in one forward pass of twice the rows, ``lazy`` that with V drawn anew every ten steps, to which all
of them wait (``fold="refresh"``): the mean of ten steps, one of which sweeps the weights.
``--probes`` adds steps of four probes of every example, with one, two and four of them to a forward pass of their rows.
Models have random weights. One logit row a sequence is computed, as for a task with one-token answers. ``reference`` transcribes
the published loop: three passes of ``torch.normal`` over the stored weights and one for the update, with a logit row for every token.
On a GPU the peaks of allocated memory of a forward pass and of a step are compared as well, with the largest tuned layer beside
them (on a CPU ``memory.py`` does that, in processes of their own). ``--profile`` adds the time of each kernel in a step of both kinds and in one
forward pass, and how long the host and the device were busy: if the host was busy for longer, launches are what a step waits for.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from machine import parser, write
from published import EPS, reference_step
from shapes import BATCH, DTYPES, SHAPES, largest_layer, loss_of, losses_of, make, minibatch, size_of
from timing import interleave, peak_of

from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.points.both_signs import BothSigns

#: Steps between two sweeps of the weights, where they wait.
SPAN = 10
#: Of four probes, how many share a forward pass.
PROBES_PER_PASS = (1, 2, 4)


def perturbed(optimizer: MeZO, loss: Callable[[], torch.Tensor]) -> None:
    """One evaluation at theta + eps z."""
    assert optimizer.perturbation is not None
    with optimizer.perturbation as perturbation:
        perturbation.shift(0, Query(0, EPS))
        loss()


@torch.no_grad()
def measure(model: Any, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and their ratios; peaks of memory on a GPU."""
    device = options.device
    batch = minibatch(model, length, device)
    loss, optimizer = loss_of(model, batch), MeZO(model, lr=1e-9, eps=EPS)

    def full_loss() -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["positions"]]
        return logits.float().logsumexp(dim=-1).mean()

    optimizer.step(loss)
    assert optimizer.perturbation is not None
    losses, own = losses_of(model, batch), MeZO(model, lr=1e-9, eps=EPS, assignment="example")
    own.step(losses)
    both = MeZO(model, lr=1e-9, eps=EPS, assignment="example", perturbation="both_signs")
    both.step(losses)
    lazy = MeZO(model, lr=1e-9, eps=EPS, assignment="example", perturbation="both_signs", refresh=SPAN, fold="refresh")
    lazy.step(losses)
    works: dict[str, Callable[[], object]] = {
        "forward": loss,
        "perturbed_forward": lambda: perturbed(optimizer, loss),
        "step": lambda: optimizer.step(loss),
        "example_forwards": lambda: own.evaluator.losses(own.next_step, own.estimator.queries(), losses),
        "example_step": lambda: own.step(losses),
        "both_forward": lambda: both.evaluator.losses(both.next_step, both.estimator.queries(), losses),
        "both_step": lambda: both.step(losses),
        "lazy_span": lambda: [lazy.step(losses) for _ in range(SPAN)],
    }
    for together in PROBES_PER_PASS if options.probes else ():
        probing = MeZO(
            model, lr=1e-9, eps=EPS, assignment="example", perturbation="both_signs", probes=4, probes_per_pass=together
        )
        probing.step(losses)
        works[f"four_probes_by_{together}"] = lambda probing=probing: probing.step(losses)
    if not options.no_reference:
        works["reference"] = lambda: reference_step(model, full_loss, 1e-9, 0)
    seconds = interleave(works, options.rounds, device)
    seconds["lazy_step"] = seconds.pop("lazy_span") / SPAN
    floor = 2 * seconds["forward"]
    row: dict[str, Any] = {
        "seconds": seconds,
        "perturbation": optimizer.perturbation.name,  # not scratch: the self-check found something
        "step_over_floor": seconds["step"] / floor,
        "example_forwards_over_floor": seconds["example_forwards"] / floor,
        "example_step_over_floor": seconds["example_step"] / floor,
        "both_forward_over_floor": seconds["both_forward"] / floor,
        "both_step_over_floor": seconds["both_step"] / floor,
        "lazy_step_over_floor": seconds["lazy_step"] / floor,
        "both_signs": isinstance(both.perturbation, BothSigns) and both.perturbation.together,
    }
    row |= {f"{name}_over_floor": took / floor for name, took in seconds.items() if name.startswith("four_probes")}
    if "reference" in seconds:
        row["reference_over_floor"] = seconds["reference"] / floor
        row["reference_over_step"] = seconds["reference"] / seconds["step"]
    if torch.device(device).type == "cuda":
        row["memory"] = peaks(optimizer, loss, model, device)
    if options.profile:
        row["profile"] = {name: profile(works[name], device) for name in ("forward", "step", "example_step")}
    return row


def profile(work: Callable[[], object], device: str) -> dict[str, Any]:
    """Milliseconds of the host and of the device in one piece of work, and of the kernels that took the most."""
    gpu = torch.device(device).type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if gpu else [])]) as profiler:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    events = profiler.key_averages()
    # Of a kernel the device's own event; of a CPU's operators what they took themselves.
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    kernels = [event for event in events if not gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted(kernels, key=lambda event: getattr(event, key), reverse=True)
    return {
        "host_ms": sum(event.self_cpu_time_total for event in events) / 1e3,
        "device_ms": sum(getattr(event, key) for event in kernels) / 1e3,
        "launches": sum(event.count for event in kernels),
        "kernels": [
            {"name": event.key[:100], "count": event.count, "ms": getattr(event, key) / 1e3} for event in kernels[:12]
        ],
    }


def peaks(optimizer: MeZO, loss: Callable[[], torch.Tensor], model: Any, device: str) -> dict[str, int]:
    """Allocated bytes at the peak of a forward pass without an optimizer's scratch memory, and of a step."""
    step = peak_of(lambda: optimizer.step(loss), device)
    optimizer.evaluator = (
        optimizer.evaluator.forgotten()
    )  # its scratch memory is not inference's; the next first step finds the same again
    gc.collect()
    inference = peak_of(loss, device)
    first = peak_of(lambda: optimizer.step(loss), device)
    return {
        "weights": size_of(model),
        "inference": inference,
        "step": step,
        "more": step - inference,
        "first": first - inference,
        "bound": largest_layer(model),
    }


def main() -> None:
    """Print and save the ratios."""
    asked = parser(__doc__)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--shapes", nargs="+", choices=SHAPES)
    asked.add_argument("--dtypes", nargs="+", choices=DTYPES)
    asked.add_argument("--lengths", nargs="+", type=int)
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--no-reference", action="store_true", help="leave the published loop out")
    asked.add_argument("--probes", action="store_true", help="also time steps of four probes, several to a pass")
    asked.add_argument("--profile", action="store_true", help="also time the kernels of a step and of a forward pass")
    asked.add_argument("--output", help="name of the result file: step on a CPU, step-cuda on a GPU")
    options = asked.parse_args()
    gpu = torch.device(options.device).type == "cuda"
    shapes = options.shapes or (["125m", "1.3b", "6.7b", "13b"] if gpu else ["smollm2-135m"])
    dtypes = options.dtypes or (["bfloat16"] if gpu else ["bfloat16", "float32"])
    lengths = options.lengths or ([32, 64, 400] if gpu else [32])
    rows = []
    titles = (
        "step / 2 forwards",
        "example: 2 forwards",
        "example: step",
        "both: 1 forward",
        "both: step",
        "lazy: step",
        "reference / 2 forwards",
        "reference / step",
        "step, s",
    )
    print(f"{'shape':14}{'dtype':10}{'length':>6}" + "".join(f"{title:>23}" for title in titles))
    for shape in shapes:
        for name in dtypes:
            model = make(shape, DTYPES[name], options.device)
            for length in lengths:
                row = {"shape": shape, "dtype": name, "batch": [BATCH, length], **measure(model, length, options)}
                rows.append(row)
                none = float("nan")
                numbers = (
                    row["step_over_floor"],
                    row["example_forwards_over_floor"],
                    row["example_step_over_floor"],
                    row["both_forward_over_floor"],
                    row["both_step_over_floor"],
                    row["lazy_step_over_floor"],
                    row.get("reference_over_floor", none),
                    row.get("reference_over_step", none),
                    row["seconds"]["step"],
                )
                print(f"{shape:14}{name:10}{length:6}" + "".join(f"{number:23.3f}" for number in numbers), flush=True)
                if "memory" in row:
                    mib = {key: value / 2**20 for key, value in row["memory"].items()}
                    print("    MiB: " + ", ".join(f"{key} {value:,.1f}" for key, value in mib.items()), flush=True)
                for work, found in row.get("profile", {}).items():
                    print(
                        f"    {work}: host {found['host_ms']:.1f} ms, device {found['device_ms']:.1f} ms, {found['launches']} launches"
                    )
                    for kernel in found["kernels"]:
                        print(f"{kernel['ms']:14.2f} ms{kernel['count']:7}  {kernel['name']}", flush=True)
                if row["perturbation"] != "scratch":
                    print(
                        f"    the self-check chose perturbation={row['perturbation']!r}: this is not the step meant here"
                    )
                write(options.output or ("step-cuda" if gpu else "step"), {"rows": rows})
            del model
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
