"""``forwardtune replay | inspect | export``: what can be done with a step log."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..averages import NONE
from ..config import recorded
from ..errors import InputError
from ..models import load_model, save_model
from ..run_folder import INITIAL, LOG
from ..storage import storage_named
from ..trajectory import export_trajectory, read_log, replay
from ..trajectory.export import read_trajectory
from ..trajectory.format import ABSENT
from ..trajectory.updates import standing, trajectory_of
from . import say, tuned
from .methods import unchanged_share, weights_of
from .progress import bar, reach
from .results import new_folder

# What a header leaves out where it is as usual.
_METHOD = (
    "probes_rise", "normalize", "assignment", "rank", "refresh", "fold", "active_layers", "sparsity", "modify", "modify_by",
)  # fmt: skip


def run_replay(options: argparse.Namespace) -> None:
    """Rebuild the tuned weights and save them as an ordinary model folder."""
    path = log_in(options.log)
    is_export = path.suffix == ".safetensors"
    trajectory = read_trajectory(path) if is_export else trajectory_of(read_log(path))
    steps = trajectory.steps if options.steps is None else options.steps
    averaged = trajectory.averaged(options.average, steps)  # refused before the model is loaded
    folder = new_folder(options.output_dir)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtypes = {tensor["dtype"] for tensor in trajectory.header["tensors"]}
    say(f"loading {options.model}")
    run = recorded(trajectory.header["run"])
    adapted = run.tune in ("lora", "prefix")  # then the logged dtype is the adapter's, not the model's
    dtype = dtypes.pop() if len(dtypes) == 1 and not adapted and "frozen" not in trajectory.header else run.dtype
    quantize = options.quantize or run.quantize
    storage = storage_named(options.offload, folder, options.device)
    if storage is not None and quantize is not None:
        raise InputError(f"--quantize {quantize} keeps its integers on the device: leave --offload out")
    model, tokenizer = load_model(
        options.model, dtype=dtype, device=options.device, quantize=quantize, storage=storage, announce=say
    )
    if adapted:
        first, tensors = path.parent / INITIAL, tuned.tensors_of(trajectory)
        model = tuned.prepare_model(model, tokenizer, options=run, first=first, tensors=tensors)
    with bar(len(trajectory.header["tensors"]), "replaying", "tensor") as progress:
        steps = replay(trajectory, model, steps=options.steps, average=averaged.average, progress=reach(progress))
    save_model(model, tokenizer, folder)
    verified = averaged.digest is not None and steps == trajectory.steps
    of = "" if averaged.average == NONE else f" to the average {averaged.average} of their weights"
    say(
        f"{steps} steps replayed{of}{', weights verified against the log' if verified else ''}; the model is in {folder}"
    )


def log_in(name: str) -> Path:
    """The step log that is named, or that of the run whose folder is.

    Raises:
        InputError: a folder without one.
    """
    path = Path(name)
    if not path.is_dir():
        return path
    if not (path / LOG).is_file():
        raise InputError(f"{path} holds no {LOG}: give the folder of a run that was tuned by MeZO, or its step log")
    return path / LOG


def run_inspect(options: argparse.Namespace) -> None:
    """Verify a log and describe it."""
    log = read_log(log_in(options.log))
    losses = [record.loss for record in log.records if math.isfinite(record.loss)]
    header, tensors = log.header, log.header["tensors"]
    taken = [record for record in log.records if not record.skipped]
    facts = {
        "intact": True,
        "finished": log.end is not None,
        "torn_last_line": log.torn,
        "steps": log.steps,
        "skipped_steps": log.steps - len(taken),
        "ways_back": len(log.rollbacks),
        "undone_steps": standing(log.rollbacks, log.steps).count(False),
        "zero_coefficient_steps": sum(record.flat for record in log.records),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(sum(record.seconds for record in log.records), 3),
        "unchanged_share": unchanged_share(log, taken),
        "learning_rates": sorted({lr for record in log.records for lr in record.lr}),
        "seed": header["seed"],
        "direction": header["direction"],
        "estimator": header["estimator"],
        "eps": header["eps"],
        "probes": header["probes"],
        **{name: header.get(name, ABSENT[name]) for name in _METHOD},
        "rule": header["rule"],
        "rule_settings": header.get("rule_settings", ABSENT["rule_settings"]),
        "weight_decay": [group["weight_decay"] for group in header["groups"]],
        "tensors": len(tensors),
        "weights": weights_of(log),
        "dtypes": sorted({tensor["dtype"] for tensor in tensors}),
        "averages": {
            f"{note.content['average']['of']} of {note.at}": note.content["average"]["digest"]
            for note in log.notes
            if "average" in note.content
        },
        "base_digest": header["base"],
        "tuned_digest": log.end["digest"] if log.end else None,
        "versions": header["versions"],
        "run": header["run"],
    }
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{log.path}: every line is intact" + (", but for a torn last one" if log.torn else ""))
    for name, value in facts.items():
        if name not in ("intact", "torn_last_line"):
            print(f"  {name.replace('_', ' ')}: {_short(value)}")
    if log.end is None:
        how = "forwardtune train --resume" if "task" in log.header["run"] else "the program that began it"
        print(f"  the run did not close its log: it was killed, or is still going. Resume it with {how}")


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"{value[0]} ... {value[-1]} ({len(value)} values)"
    if isinstance(value, dict):
        return ", ".join(f"{key} {content}" for key, content in value.items() if content is not None)
    return str(value)


def run_export(options: argparse.Namespace) -> None:
    """Write the smallest form of a run."""
    log = read_log(log_in(options.log))
    size = export_trajectory(log, options.output, options.average)
    say(f"{options.output}: {size:,} bytes for {log.steps:,} steps")
