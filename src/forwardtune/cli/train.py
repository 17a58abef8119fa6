"""``forwardtune train``: from a model and a task to a tuned model."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import memory
from ..errors import InputError
from ..evaluation import sign_test, training_objective
from ..objectives import logits_at
from ..optimizer import NonFiniteLossError
from ..tasks.encoding import collate
from ..trajectory import Log, read_log
from . import add_model_options, positive, say
from .logs import save_model
from .session import MODEL_DEFAULTS, Session, bar, fill, open_session

DEFAULTS: dict[str, Any] = {
    **MODEL_DEFAULTS,
    "steps": 1000,
    "lr": 1e-6,
    "eps": 1e-3,
    "probes": 1,
    "direction": "gaussian",
    "perturbation": "auto",
    "weight_decay": 0.0,
    "lr_scheduler": "constant",
    "clip_coefficient": None,
    "save_steps": None,
    "train_examples": 1000,
}
_SCHEDULERS = ("constant", "linear", "cosine", "inverse_sqrt", "polynomial")
# What a resumed run takes from its log, and may not change. The rest (device, steps, checkpoints) may differ.
_FIXED = [key for key in ("model", "task", *DEFAULTS) if key not in ("device", "steps", "save_steps")]


def add_commands(commands: Any) -> None:
    """Add ``train`` to the command line."""
    parser = commands.add_parser("train", help="tune a model on a task")
    add_model_options(parser)
    parser.add_argument("--output-dir", required=True, help="new folder for the tuned model and its step log")
    parser.add_argument("--steps", type=int, help="optimizer steps [1000]")
    parser.add_argument("--lr", type=float, help="learning rate [1e-6; about 1e-5 for models of 100M weights]")
    parser.add_argument("--eps", type=float, help="perturbation scale [1e-3]")
    parser.add_argument("--probes", type=int, help="directions a step; each costs two forward passes [1]")
    parser.add_argument("--direction", choices=("gaussian", "rademacher"), help="distribution of directions [gaussian]")
    parser.add_argument("--perturbation", choices=("auto", "scratch", "copy"), help="how to perturb [auto]")
    parser.add_argument("--weight-decay", type=float, help="decoupled, not on norms and biases [0]")
    parser.add_argument("--lr-scheduler", choices=_SCHEDULERS, help="course of the learning rate [constant]")
    parser.add_argument("--clip-coefficient", type=float, help="largest magnitude of a projected gradient [none]")
    parser.add_argument("--train-examples", type=int, help="tune on at most this many, drawn by --seed [1000]")
    parser.add_argument("--save-steps", type=int, help="also save a checkpoint every so many steps [none]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune, evaluate before and after, and write model, step log and metrics."""
    folder = Path(options.output_dir)
    log = _resumed(options, folder) if options.resume else None
    fill(options, DEFAULTS)
    positive(options, "steps", "lr", "eps", "probes", "train_examples", "save_steps", "clip_coefficient")
    if not 0 <= options.weight_decay < float("inf"):
        raise InputError(f"--weight-decay must be a number that is not negative, got {options.weight_decay}")
    if options.device is not None and ":" in options.device:
        raise InputError(
            f"training runs on the first device of its kind, not on {options.device}: choose it with "
            "CUDA_VISIBLE_DEVICES, and give --device cuda"
        )
    if log is None:
        _refuse_other_run(folder)
    metrics = _read_json(folder / "metrics.json") if log else {}
    if log and "after" in metrics and log.end and log.steps >= options.steps:
        say(f"the run in {folder} is complete after {log.steps} steps: nothing to do (more --steps would extend it)")
        return _report(metrics, options)

    session = open_session(options, "train", "test")
    outcomes: dict[str, list[float]] = _read_json(folder / "outcomes.json") if log else {}
    if "before" not in metrics or "before" not in outcomes:
        outcomes = {"before": []}
        metrics = {"before": session.evaluate("before", outcomes["before"])}
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "metrics.json", metrics)
        _write_json(folder / "outcomes.json", outcomes)
    measured = _train(session, folder, log)
    if measured is None:
        return 130
    if measured["skipped_steps"] == measured["steps"]:
        raise NonFiniteLossError(
            f"the loss or the step was not finite in all {measured['steps']} steps: nothing was learnt. Lower the "
            "learning rate (--lr)"
        )
    outcomes["after"] = []
    metrics["after"] = session.evaluate("after", outcomes["after"])
    metrics["sign_test"] = sign_test(outcomes["before"], outcomes["after"])
    save_model(session.model, session.tokenizer, folder)
    _write_json(folder / "outcomes.json", outcomes)
    metrics.update(measured)
    _write_json(folder / "metrics.json", metrics)
    return _report(metrics, options)


def _train(session: Session, folder: Path, log: Log | None) -> dict[str, Any] | None:
    """Run the trainer; None when Ctrl-C stopped it."""
    from ..trainer import MeZOConfig, MeZOTrainer
    from .watcher import Watcher, stop_on_interrupt

    options, model, tokenizer = session.options, session.model, session.tokenizer
    collator = partial(collate, pad=tokenizer.pad_token_id, shared=session.shared, dtype=model.dtype)
    inference_peak = _inference_peak(session, collator)
    try:
        config = MeZOConfig(
            output_dir=str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type=options.lr_scheduler,
            weight_decay=options.weight_decay,
            eps=options.eps,
            probes=options.probes,
            direction=options.direction,
            perturbation=options.perturbation,
            clip_coefficient=options.clip_coefficient,
            seed=options.seed,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    settings = {key: getattr(options, key) for key in ("model", "task", *DEFAULTS)}
    trainer = MeZOTrainer(
        model=model,
        args=config,
        train_dataset=session.splits["train"],
        data_collator=collator,
        processing_class=tokenizer,
        objective=training_objective(session.task),
        run={key: value for key, value in settings.items() if value is not None},
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    done = log.steps if log else 0
    say(f"tuning for {options.steps} steps{f', {done} of them done' if done else ''}; steps go to {trainer.step_log}")
    memory.reset_peak(options.device)
    with bar(options.steps, "tuning", "step", done) as progress, stop_on_interrupt() as interrupted:
        trainer.add_callback(Watcher(trainer, progress, interrupted))
        trainer.train(resume_from_checkpoint=bool(log))
    peak = memory.peak(options.device)
    if interrupted and trainer.state.global_step < options.steps:
        saved = folder / f"checkpoint-{trainer.state.global_step}"
        say(f"stopped after step {trainer.state.global_step} of {options.steps}; the weights so far are in {saved}")
        say(f"go on with: forwardtune train --output-dir {folder} --resume")
        return None
    records = read_log(trainer.step_log).records
    seconds = sum(record.seconds for record in records)
    return {
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, len(records)),
        "peak_memory_bytes": peak,
        "inference_peak_memory_bytes": inference_peak,
        "steps": len(records),
        "skipped_steps": sum(record.skipped for record in records),
        "perturbation": trainer.mezo.perturbation.name if trainer.mezo.perturbation else options.perturbation,
        "settings": settings,
    }


def _inference_peak(session: Session, collator: Any) -> int:
    """Peak memory of one forward pass over the longest minibatch that training can draw."""
    longest = sorted(session.splits["train"], key=lambda e: e.length)[-session.options.batch_size :]
    batch = {name: tensor.to(session.model.device) for name, tensor in collator(longest).items()}
    memory.reset_peak(session.options.device)
    with torch.no_grad():
        logits_at(session.model, batch)
    return memory.peak(session.options.device)


def _resumed(options: argparse.Namespace, folder: Path) -> Log:
    """The log of the run in the folder; its settings become the options."""
    if not (folder / "steps.jsonl").is_file():
        raise InputError(f"{folder} holds no run to resume (no steps.jsonl): start one without --resume")
    log = read_log(folder / "steps.jsonl")
    for name in _FIXED:
        recorded, given = log.header["run"].get(name), getattr(options, name)
        if given is not None and given != recorded:
            raise InputError(
                f"the run in {folder} has --{name.replace('_', '-')} {recorded}, not {given}: leave the option out to "
                "resume it, or start another run in another folder"
            )
        setattr(options, name, recorded)
    for name in ("steps", "device", "save_steps"):
        if getattr(options, name) is None:
            setattr(options, name, log.header["run"].get(name))
    return log


def _refuse_other_run(folder: Path) -> None:
    if (folder / "steps.jsonl").exists():
        raise InputError(
            f"{folder} holds another run: add --resume to go on with it, or choose another --output-dir "
            "(nothing was overwritten)"
        )
    # A run that was killed before its first step leaves its first evaluation behind, and nothing else.
    leftover = ("metrics.json", "outcomes.json")
    if folder.is_file() or (folder.is_dir() and not all(path.name.startswith(leftover) for path in folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose another --output-dir (nothing was overwritten)")


def _read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if it is missing or damaged, as then it is made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(json.dumps(content, indent=None if path.stem == "outcomes" else 2) + "\n", encoding="utf-8")
    os.replace(partial_file, path)


def _report(metrics: dict[str, Any], options: argparse.Namespace) -> int:
    """Say what came of it."""
    before, after = metrics["before"], metrics["after"]
    say()
    held_out = f"{after['examples']} held-out examples"
    say(f"{held_out:24}{'before':>12}{'after':>12}")
    for name in after:
        if name != "examples":
            say(f"{name:24}{before[name]:12.4f}{after[name]:12.4f}")
    test = metrics["sign_test"]
    say(f"{test['better']} examples came out better, {test['worse']} worse: p = {test['p_value']:.1e} by the sign test")
    mib = {key: metrics[f"{key}peak_memory_bytes"] / 2**20 for key in ("", "inference_")}
    say(f"peak memory {mib['']:,.0f} MiB; inference on the same batch size {mib['inference_']:,.0f} MiB")
    say(f"{metrics['seconds']:.0f} s in {metrics['steps']} steps, {metrics['seconds_per_step']:.2f} s a step")
    say(f"model, steps.jsonl and metrics.json are in {options.output_dir}")
    if options.json:
        print(json.dumps(metrics))
    return 0
