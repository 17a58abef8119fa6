"""``forwardtune train``: from a model and a task to a tuned model."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..estimators import ESTIMATORS, NORMALIZATIONS
from ..evaluation import sign_test
from ..files import read_json
from ..models import save_model
from ..optimizer import NonFiniteLossError
from ..rules import RULES, STATES
from ..trajectory import Log, read_log
from . import add_model_options, methods, positive, say
from .results import HISTORY, METRICS, OUTCOMES, new_folder, plain, table, write_json, write_lines
from .session import MODEL_DEFAULTS, fill, open_session

DEFAULTS: dict[str, Any] = {
    **MODEL_DEFAULTS,
    "method": "mezo",
    "tune": "all",
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_targets": None,
    "prefix_length": 5,
    "estimator": "spsa",
    "probes": 1,
    "normalize": "none",
    "rule": "sgd",
    "momentum": 0.9,
    "rule_state": "auto",
    "direction": "gaussian",
    "perturbation": "auto",
    "weight_decay": 0.0,
    "lr_scheduler": "constant",
    "clip_coefficient": None,
    "save_steps": None,
    "eval_steps": None,
    "objective": "loss",
    "temperature": 0.0,
}
# What the paper uses, by what is tuned (appendix E.3; the larger of its learning rates).
_BY_MODE = {"lora": {"lr": 1e-4, "eps": 1e-2}, "prefix": {"lr": 1e-2, "eps": 1e-1}}
_MEZO = {"lr": 1e-6, "eps": 1e-3, "steps": 1000}
_ADAM = {"lr": 1e-5, "batch_size": 8}
_ADAM_EPOCHS = 5
_SCHEDULERS = ("constant", "linear", "cosine", "inverse_sqrt", "polynomial")
# What a resumed run may change; the rest comes from its log.
_FREE = ("device", "steps", "save_steps", "eval_steps", "data_dir")
# What has an effect with one method, or on one way to tune, alone.
_ONLY = {
    "--method mezo": (
        "objective",
        "temperature",
        "eps",
        "probes",
        "direction",
        "perturbation",
        "clip_coefficient",
        "save_steps",
    ),
    "--rule momentum": ("momentum",),
    "--tune lora": ("lora_rank", "lora_alpha", "lora_targets"),
    "--tune prefix": ("prefix_length",),
}
_SETTINGS = ("model", "task", "lr", "eps", "steps", *DEFAULTS)


def add_commands(commands: Any) -> None:
    """Add ``train`` to the command line."""
    parser = commands.add_parser("train", help="tune a model on a task")
    add_model_options(parser)
    parser.add_argument("--output-dir", required=True, help="new folder for the tuned model and its step log")
    parser.add_argument("--method", choices=tuple(methods.METHODS), help="mezo, or adam: backpropagation [mezo]")
    parser.add_argument("--objective", help="loss, accuracy, f1, exact_match, module:function, or a sum of them [loss]")
    parser.add_argument("--temperature", type=float, help="of sampled text; 0 takes the likeliest tokens [0]")
    parser.add_argument("--tune", help="all, lora, prefix, or a pattern of parameter names [all]")
    parser.add_argument("--lora-rank", type=int, help="width of the LoRA matrices [8]")
    parser.add_argument("--lora-alpha", type=float, help="scale of LoRA, times 1/rank [16]")
    parser.add_argument("--lora-targets", help="names of the layers to adapt, by commas [query and value projections]")
    parser.add_argument("--prefix-length", type=int, help="positions of the prefix [5]")
    parser.add_argument("--steps", type=int, help="optimizer steps [1000; adam: 5 epochs]")
    parser.add_argument("--lr", type=float, help="learning rate [1e-6, lora 1e-4, prefix 1e-2; adam 1e-5]")
    parser.add_argument("--eps", type=float, help="perturbation scale [1e-3, lora 1e-2, prefix 1e-1]")
    parser.add_argument("--probes", type=int, help="directions a step; each costs two forward passes [1]")
    parser.add_argument("--estimator", choices=tuple(ESTIMATORS), help="two-sided spsa, or one_sided probes [spsa]")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="units of coefficients over the probes [none]")
    parser.add_argument("--rule", choices=tuple(RULES), help="how coefficients move the weights [sgd]")
    parser.add_argument("--momentum", type=float, help="of --rule momentum [0.9]")
    parser.add_argument("--rule-state", choices=STATES, help="moments of momentum and adam: kept, or rebuilt [auto]")
    parser.add_argument("--direction", choices=("gaussian", "rademacher"), help="distribution of directions [gaussian]")
    parser.add_argument("--perturbation", choices=("auto", "scratch", "copy"), help="how to perturb [auto]")
    parser.add_argument("--weight-decay", type=float, help="decoupled, not on norms and biases [0]")
    parser.add_argument("--lr-scheduler", choices=_SCHEDULERS, help="course of the learning rate [constant]")
    parser.add_argument("--clip-coefficient", type=float, help="largest magnitude of a projected gradient [none]")
    parser.add_argument(
        "--eval-steps", type=int, help="measure the dev split so often and keep the best step's weights"
    )
    parser.add_argument("--save-steps", type=int, help="also save a checkpoint every so many steps [none]")
    parser.add_argument("--no-before", action="store_true", help="do not evaluate the untuned model")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune, evaluate before and after, and write model, step log and metrics."""
    folder = Path(options.output_dir)
    log = _resumed(options, folder) if options.resume else None
    if log is None:
        _refuse_idle(options)
    _fill(options)
    _check(options)
    if log is None:
        # A run that was killed before its first step leaves its first evaluation behind, and nothing else.
        begun = not read_json(folder / METRICS).keys() - {"before"}
        new_folder(folder, leftovers=(METRICS, OUTCOMES, methods.INITIAL) if begun else (), resumable=True)
    metrics = read_json(folder / METRICS) if log else {}
    if log and "test" in metrics and log.end and log.steps >= options.steps:
        say(f"the run in {folder} is complete after {log.steps} steps: nothing to do (more --steps would extend it)")
        return _report(metrics, options)

    prepare = partial(methods.prepare_model, options=options, first=folder / methods.INITIAL if log else None)
    session = open_session(options, "train", "dev", "test", prepare_model=prepare)
    if options.steps is None:
        options.steps = max(1, _ADAM_EPOCHS * len(session.splits["train"]) // options.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    if options.tune in ("lora", "prefix") and log is None:
        methods.keep_first(session.model, folder / methods.INITIAL)
    outcomes: dict[str, list[float]] = read_json(folder / OUTCOMES) if log else {}
    if not options.no_before and ("before" not in metrics or "before" not in outcomes):
        outcomes = {"before": []}
        metrics = {"before": session.evaluate("before", outcomes=outcomes["before"])}
        write_json(folder / METRICS, metrics)
        write_json(folder / OUTCOMES, outcomes)
    trained = methods.METHODS[options.method](session, folder, log, settings(options))
    if trained is None:
        return 130
    if trained.facts["skipped_steps"] == trained.facts["steps"]:
        raise NonFiniteLossError(
            f"the loss or the step was not finite in all {trained.facts['steps']} steps: nothing was learnt. Lower the "
            "learning rate (--lr)"
        )
    outcomes["after"] = []
    metrics = {
        **session.facts("train", options.method),
        **({"before": metrics["before"]} if "before" in metrics else {}),
    }
    metrics["test"] = session.evaluate("after", outcomes=outcomes["after"])
    if "before" in outcomes:
        metrics["sign_test"] = sign_test(outcomes["before"], outcomes["after"])
    metrics.update(trained.facts)
    save_model(session.model, session.tokenizer, folder)
    write_lines(folder / HISTORY, trained.history)
    write_json(folder / OUTCOMES, outcomes)
    write_json(folder / METRICS, metrics)
    return _report(metrics, options)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the step log records of a run."""
    return {key: value for key in _SETTINGS if (value := getattr(options, key)) is not None}


def _fill(options: argparse.Namespace) -> None:
    """Defaults, which depend on the method and on what is tuned."""
    method, mode = options.method or DEFAULTS["method"], options.tune or DEFAULTS["tune"]
    own = _ADAM if method == "adam" else {**_MEZO, **_BY_MODE.get(mode, {})}
    fill(options, {**DEFAULTS, **own})


def _check(options: argparse.Namespace) -> None:
    positive(
        options, "steps", "lr", "eps", "probes", "save_steps", "eval_steps", "clip_coefficient", "lora_rank",
        "lora_alpha", "prefix_length",
    )  # fmt: skip
    if not 0 <= options.weight_decay < float("inf"):
        raise InputError(f"--weight-decay must be a number that is not negative, got {options.weight_decay}")
    if not 0 <= options.temperature < float("inf"):
        raise InputError(f"--temperature must be a number that is not negative, got {options.temperature}")
    if options.device is not None and ":" in options.device:
        raise InputError(
            f"training runs on the first device of its kind, not on {options.device}: choose it with "
            "CUDA_VISIBLE_DEVICES, and give --device cuda"
        )


def _refuse_idle(options: argparse.Namespace) -> None:
    """Raise InputError for an option that would have no effect."""
    method, mode, rule = (getattr(options, name) or DEFAULTS[name] for name in ("method", "tune", "rule"))
    for belongs, names in _ONLY.items():
        for name in names:
            if getattr(options, name) is not None and belongs not in (
                f"--method {method}",
                f"--tune {mode}",
                f"--rule {rule}",
            ):
                raise InputError(f"--{name.replace('_', '-')} belongs to {belongs}: leave it out")
    if options.eval_steps is not None and options.dev_examples == 0:
        raise InputError("--eval-steps measures development examples, and --dev-examples is 0: leave one of them out")


def _resumed(options: argparse.Namespace, folder: Path) -> Log:
    """The log of the run in the folder; its settings become the options."""
    if options.method == "adam":
        raise InputError("--method adam keeps no step log to resume from: run it again in a new folder")
    if not (folder / "steps.jsonl").is_file():
        raise InputError(f"{folder} holds no run to resume (no steps.jsonl): start one without --resume")
    log = read_log(folder / "steps.jsonl")
    for name in _SETTINGS:
        recorded, given = log.header["run"].get(name), getattr(options, name)
        if name in _FREE:
            setattr(options, name, recorded if given is None else given)
            continue
        if given is not None and given != recorded:
            raise InputError(
                f"the run in {folder} has --{name.replace('_', '-')} {recorded}, not {given}: leave the option out to "
                "resume it, or start another run in another folder"
            )
        setattr(options, name, recorded)
    return log


def _report(metrics: dict[str, Any], options: argparse.Namespace) -> int:
    """Say what came of it."""
    say()
    table({name: metrics[key] for name, key in (("before", "before"), ("after", "test")) if key in metrics})
    if test := metrics.get("sign_test"):
        say(
            f"{test['better']} examples came out better, {test['worse']} worse: p = {test['p_value']:.1e} by the sign test"
        )
    mib = {key: metrics[f"{key}peak_memory_bytes"] / 2**20 for key in ("", "inference_")}
    say(f"peak memory {mib['']:,.0f} MiB; inference on the same batch size {mib['inference_']:,.0f} MiB")
    say(f"{metrics['seconds']:.0f} s in {metrics['steps']} steps, {metrics['seconds_per_step']:.2f} s a step")
    if metrics.get("best_step", metrics["steps"]) != metrics["steps"]:
        say(f"the weights are those of step {metrics['best_step']}, which was best on the dev split")
    say(f"model, {'steps.jsonl' if options.method == 'mezo' else HISTORY} and {METRICS} are in {options.output_dir}")
    if options.json:
        print(json.dumps(plain(metrics)))
    return 0
