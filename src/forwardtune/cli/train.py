"""``forwardtune train``: from a model and a task to a tuned model."""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..durations import duration
from ..errors import InputError, NonFiniteLossError
from ..evaluation import sign_test
from ..files import read_json
from ..models import EMBEDDED_MODEL, save_model
from ..processes import require_one_process
from ..search.auto import AUTO, MEASUREMENTS
from ..tasks import get_task, task_names
from ..tasks.splits import DEFAULT_RULE
from ..trajectory import Log, read_log
from . import methods, positive, say
from .results import (
    COMPLETIONS,
    HISTORY,
    METRICS,
    OUTCOMES,
    new_folder,
    plain,
    read_lines,
    resume_command,
    table,
    write_json,
    write_lines,
)
from .session import MODEL_DEFAULTS, Session, fill, open_session

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
    "patience": None,
    "objective": "loss",
    "temperature": 0.0,
    "log_completions": None,
}
#: Steps of a run that is told neither steps nor time.
STEPS = 1000
_MEZO = {"lr": AUTO, "eps": AUTO}
_ADAM = {"lr": 1e-5, "eps": None, "batch_size": 8}
_ADAM_EPOCHS = 5
_LEAST_MEASURED = 64
# Where the step log keeps how many development examples are measured.
_MEASURED = "dev_measured"
# Where transformers lets a polynomial schedule end.
_POLYNOMIAL_END = 1e-7
# The rule that drew the splits; logs that do not say were drawn by the default one.
_RULE = "split_rule"
# What a resumed run may change; the rest comes from its log.
_FREE = ("device", "steps", "save_steps", "eval_steps", "patience", "log_completions", "data_dir", "no_before")
# What may name a file or a folder.
_PLACES = ("model", "task", "data_dir")
# What has an effect with one method, or on one way to tune, alone.
_ONLY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--method mezo",): (
        "objective",
        "temperature",
        "log_completions",
        "eps",
        "estimator",
        "probes",
        "normalize",
        "rule",
        "rule_state",
        "momentum",
        "direction",
        "perturbation",
        "clip_coefficient",
        "save_steps",
        "time_budget",
    ),
    ("--rule momentum",): ("momentum",),
    ("--rule momentum", "--rule adam"): ("rule_state",),
    ("--tune lora",): ("lora_rank", "lora_alpha", "lora_targets"),
    ("--tune prefix",): ("prefix_length",),
}
# Test examples of which the completions are kept.
_SAMPLES = 32
_SETTINGS = ("model", "task", "lr", "eps", "steps", "time_budget", "no_before", *DEFAULTS)


def run(options: argparse.Namespace) -> int:
    """Tune, evaluate before and after, and write model, step log and metrics."""
    require_one_process()
    began = time.monotonic()
    folder = Path(options.output_dir)
    for name in _PLACES:  # the log may be read in another folder
        setattr(options, name, _absolute(getattr(options, name)))
    log = _resumed(options, folder) if options.resume else None
    settle(options, log)
    if log is None:
        # A run that was killed before its first step leaves its first evaluation behind, and nothing else.
        begun = not read_json(folder / METRICS).keys() - {"before"}
        leftovers = (METRICS, OUTCOMES, COMPLETIONS, methods.INITIAL, "steps.jsonl.lock") if begun else ()
        new_folder(folder, leftovers=leftovers, resumable=True)
    metrics = read_json(folder / METRICS) if log else {}
    if log and "test" in metrics and log.end and _is_done(options, log, metrics):
        say(f"the run in {folder} is complete after {log.steps} steps: nothing to do (more --steps would extend it)")
        return _report(metrics, options)

    prepare = partial(methods.prepare_model, options=options, first=folder / methods.INITIAL if log else None)
    session = open_session(options, "train", "dev", "test", prepare_model=prepare, resumed=log)
    if options.steps is None:
        options.steps = _steps(session, began)  # before anything is evaluated: the time may be too short
    folder.mkdir(parents=True, exist_ok=True)
    if options.tune in ("lora", "prefix") and log is None:
        methods.keep_first(session.model, folder / methods.INITIAL)
    outcomes: dict[str, list[float]] = read_json(folder / OUTCOMES) if log else {}
    if not options.no_before and ("before" not in metrics or "before" not in outcomes):
        outcomes = {"before": []}
        before: list[str] = []
        metrics = {"before": session.evaluate("before", outcomes=outcomes["before"], completions=before)}
        if options.log_completions:
            write_lines(folder / COMPLETIONS, _samples(session, 0, before, outcomes["before"]))
        write_json(folder / METRICS, metrics)
        write_json(folder / OUTCOMES, outcomes)
    # What the step log records beside the options.
    described: dict[str, Any] = {_RULE: session.task.splits}
    if "dev" in session.splits:
        whole = len(session.splits["dev"])
        measured = log.header["run"].get(_MEASURED, whole) if log else measured_examples(options, options.steps, whole)
        session.thin("dev", measured)
        if measured < whole:
            described[_MEASURED] = measured
    if options.eval_steps is None:
        options.eval_steps = evaluation_steps(options, options.steps)
    trained = methods.METHODS[options.method](session, folder, log, {**settings(options), **described})
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
    after: list[str] = []
    metrics["test"] = session.evaluate("after", outcomes=outcomes["after"], completions=after)
    if options.log_completions:
        step = trained.facts.get("best_step", trained.facts["steps"])
        kept = [line for line in read_lines(folder / COMPLETIONS) if (line["step"], line["split"]) != (step, "test")]
        write_lines(folder / COMPLETIONS, [*kept, *_samples(session, step, after, outcomes["after"])])
    if "before" in outcomes:
        metrics["sign_test"] = sign_test(outcomes["before"], outcomes["after"])
    metrics.update(trained.facts)
    save_model(session.model, session.tokenizer, folder)
    write_lines(folder / HISTORY, trained.history)
    write_json(folder / OUTCOMES, outcomes)
    write_json(folder / METRICS, metrics)
    return _report(metrics, options)


def settle(options: argparse.Namespace, log: Log | None = None) -> None:
    """Give options their defaults, and refuse what cannot be."""
    if log is None:
        _refuse_idle(options)
    _fill(options)
    _check(options)


def evaluation_steps(options: argparse.Namespace, steps: int) -> int | None:
    """Steps between measurements of the development split: as told, or 20 in a run that finds its learning rate."""
    if options.eval_steps is not None or options.lr != AUTO or options.dev_examples == 0:
        return options.eval_steps
    return max(1, steps // MEASUREMENTS)


def measured_examples(options: argparse.Namespace, steps: int, examples: int) -> int:
    """How many of the development examples are measured: all, unless the user said neither how many nor how often.

    Then 20 measurements take a quarter of the passes that the steps take, but at least 64 examples each.
    """
    if options.lr != AUTO or options.eval_steps is not None or options.dev_examples is not None:
        return examples
    return min(examples, max(_LEAST_MEASURED, steps * options.batch_size // (2 * MEASUREMENTS)))


def _steps(session: Session, began: float) -> int:
    """The steps of a run that was not told them."""
    from . import plan

    options = session.options
    if options.method == "adam":
        return max(1, _ADAM_EPOCHS * len(session.splits["train"]) // options.batch_size)
    if not options.time_budget:
        return STEPS
    cost = plan.measure(session)
    left = options.time_budget - (time.monotonic() - began)
    steps = plan.steps_of_budget(left, cost, session)
    last = len(session.splits["test"]) + measured_examples(options, steps, len(session.splits.get("dev", ())))
    session.deadline = began + options.time_budget - last * cost.evaluation
    say(f"{cost.step:.2f} s a step: {steps} steps fit the {duration(left)} that are left")
    return steps


def _samples(session: Session, step: int, texts: list[str], outcomes: list[float]) -> list[dict[str, Any]]:
    """What was written for the first test examples, and how it was judged."""
    examples = session.splits["test"][:_SAMPLES]
    return [
        {
            "step": step,
            "split": "test",
            "prompt": e.example.prompt,
            "completion": text,
            "objective": {session.metric: value},
        }
        for e, text, value in zip(examples, texts, outcomes, strict=False)
    ]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the step log records of a run."""
    return {key: value for key in _SETTINGS if (value := getattr(options, key)) is not None}


def _fill(options: argparse.Namespace) -> None:
    """Defaults, which depend on the method."""
    method = options.method or DEFAULTS["method"]
    fill(options, {**DEFAULTS, **(_ADAM if method == "adam" else _MEZO)})


def _check(options: argparse.Namespace) -> None:
    positive(
        options, "steps", "probes", "save_steps", "eval_steps", "patience", "log_completions",
        "clip_coefficient", "lora_rank", "lora_alpha", "prefix_length",
    )  # fmt: skip
    if options.method == "adam" and options.lr == AUTO:
        raise InputError("--lr auto is found with forward passes, by --method mezo: give a number for adam")
    if options.steps is not None and options.time_budget is not None and not options.resume:
        raise InputError("--steps and --time-budget both say how long to tune: leave one of them out")
    if options.patience is not None and evaluation_steps(options, options.steps or STEPS) is None:
        raise InputError("--patience counts measurements of the dev split: give --eval-steps too")
    if options.normalize != "none" and options.probes < 2:
        raise InputError(
            f"--normalize {options.normalize} compares the probes of a step, and there is one: give --probes 2 or more"
        )
    if not 0 <= options.momentum < 1:
        raise InputError(f"--momentum must be a number from 0 up to 1, 1 excluded, got {options.momentum}")
    if options.lr_scheduler == "polynomial" and options.lr != AUTO and options.lr <= _POLYNOMIAL_END:
        raise InputError(
            f"--lr-scheduler polynomial ends at a learning rate of {_POLYNOMIAL_END:g}, and --lr is {options.lr:g}: "
            "give a larger one, or --lr-scheduler linear"
        )
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
            chosen = {f"--method {method}", f"--tune {mode}", f"--rule {rule}"}
            if getattr(options, name) is not None and chosen.isdisjoint(belongs):
                raise InputError(f"--{name.replace('_', '-')} belongs to {' or '.join(belongs)}: leave it out")
    if options.eval_steps is not None and options.dev_examples == 0:
        raise InputError("--eval-steps measures development examples, and --dev-examples is 0: leave one of them out")


def _is_done(options: argparse.Namespace, log: Log, metrics: dict[str, Any]) -> bool:
    """Whether a run has all its steps, or ended early as it was told to, and no more are asked for."""
    return bool(log.steps >= options.steps or ("stopped" in metrics and options.steps <= log.header["run"]["steps"]))


def _resumed(options: argparse.Namespace, folder: Path) -> Log:
    """The log of the run in the folder; its settings become the options."""
    if options.method == "adam":
        raise InputError("--method adam keeps no step log to resume from: run it again in a new folder")
    if not (folder / "steps.jsonl").is_file():
        raise InputError(f"{folder} holds no run to resume (no steps.jsonl): start one without --resume")
    log = read_log(folder / "steps.jsonl")
    objective = str(log.header["run"].get("objective"))
    if options.objective is None and ":" in objective:  # a log may come from anyone
        raise InputError(
            f"the run in {folder} is rewarded by {objective}, which is code, and is not imported because a log names it. "
            f"If you know it, name it again: {resume_command(folder, objective)}"
        )
    for name in _SETTINGS:
        recorded, given = log.header["run"].get(name), getattr(options, name)
        if name in _FREE:
            setattr(options, name, recorded if given is None else given)
            continue
        if name in _PLACES:
            recorded = _absolute(recorded)
            if recorded is not None and Path(recorded).is_absolute() and not Path(recorded).exists():
                if given is None:
                    raise InputError(
                        f"the run in {folder} has --{name} {recorded}, which is not there: say where it is now"
                    )
                if (
                    Path(given).name == Path(recorded).name
                ):  # it was moved; a model is known by the digest of its weights
                    recorded = given
        if given is not None and given != recorded:
            raise InputError(
                f"the run in {folder} has --{name.replace('_', '-')} {recorded}, not {given}: leave the option out to "
                "resume it, or start another run in another folder"
            )
        setattr(options, name, recorded)
    recorded, rule = log.header["run"].get(_RULE, DEFAULT_RULE), get_task(options.task).splits
    if recorded != rule:
        raise InputError(
            f"the run in {folder} has splits drawn by the rule {recorded}, and task {options.task} now says {rule}: resume "
            f"it with a task file that says 'splits: {recorded}', or start another run in another folder"
        )
    return log


def _absolute(value: str | None) -> str | None:
    """What is a file or a folder here, by a path that holds anywhere."""
    if value is None or value in (EMBEDDED_MODEL, *task_names()):
        return value
    path = Path(value).expanduser()
    return os.path.abspath(path) if path.exists() else value


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
    if metrics.get("best_step") == 0:
        say("the weights are untuned: no step was better on the dev split")
    elif metrics.get("best_step", metrics["steps"]) != metrics["steps"]:
        say(f"the weights are those of step {metrics['best_step']}, which was best on the dev split")
    say(f"model, {'steps.jsonl' if options.method == 'mezo' else HISTORY} and {METRICS} are in {options.output_dir}")
    if options.json:
        print(json.dumps(plain(metrics)))
    return 0
