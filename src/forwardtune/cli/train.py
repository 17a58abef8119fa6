"""``forwardtune train``: from a model and a task to a tuned model."""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..config import STEPS, Train, settings
from ..config import options as options_of
from ..durations import duration
from ..errors import InputError, NonFiniteLossError
from ..evaluation import sign_test
from ..files import read_json
from ..models import EMBEDDED_MODEL, save_model
from ..processes import Launch
from ..tasks import get_task, task_names
from ..tasks.splits import DEFAULT_RULE
from ..trajectory import Log, read_log
from ..trajectory.shared import any_has_log, share_log
from ..workers import Alone, workers_of_launch
from . import methods, say, tuned
from .costs import evaluation_steps, measure, measured_examples, steps_of_budget
from .options import ask, flag
from .results import (
    COMPLETIONS,
    HISTORY,
    METRICS,
    OUTCOMES,
    TERMS,
    new_folder,
    plain,
    read_lines,
    resume_command,
    table,
    write_json,
    write_lines,
)
from .session import Session, open_session

STEP_LOG, DEV = "steps.jsonl", "dev.jsonl"
_ADAM_EPOCHS = 5
# Where the step log keeps how many development examples are measured.
_MEASURED = "dev_measured"
# The rule that drew the splits; logs that do not say were drawn by the default one.
_RULE = "split_rule"
# Test examples of which the completions are kept.
_SAMPLES = 32


def run(parsed: argparse.Namespace) -> int:
    """Tune, evaluate before and after, and write model, step log and metrics."""
    began = time.monotonic()
    asked = ask(parsed, "train")
    if asked.output_dir is None:
        raise InputError("the following arguments are required: --output-dir, here or in the file of --config")
    workers = workers_of_launch(asked.value("worker_timeout"))
    whole_folder, log = Path(asked.output_dir), None
    folder = workers.own(whole_folder)
    _require_writable(folder, workers)
    given = _absolute(asked.settings)  # the log may be read in another folder
    resume = parsed.resume or _starts_again(folder, workers)
    if resume:
        share_log(folder / STEP_LOG, workers, (METRICS, OUTCOMES, DEV, TERMS, COMPLETIONS, tuned.INITIAL))
        log, given = _resumed(given, folder)
    options = asked.describe(given, resumed=resume)
    if workers.count > 1 and options.method == "adam":
        raise InputError("--method adam is a comparison, and runs in one process: start it without torchrun")
    if log is None:
        # A run that was killed before its first step leaves its first evaluation behind, and nothing else.
        begun = not read_json(folder / METRICS).keys() - {"before"}
        leftovers = (METRICS, OUTCOMES, COMPLETIONS, tuned.INITIAL, "steps.jsonl.lock", "ranks") if begun else ()
        new_folder(folder, leftovers=leftovers, resumable=True)
        workers.wait()  # whoever makes a folder in it comes later
    metrics = read_json(folder / METRICS) if log else {}
    if log and "test" in metrics and log.end and _is_done(options, log, metrics):
        say(f"the run in {folder} is complete after {log.steps} steps: nothing to do (more --steps would extend it)")
        return _report(metrics, folder, options.method, parsed.json)

    prepare = partial(tuned.prepare_model, options=options, first=folder / tuned.INITIAL if log else None)
    session = open_session(options, "train", "dev", "test", prepare_model=prepare, resumed=log, workers=workers)
    if options.steps is None:
        options.steps = workers.first(
            lambda: _steps(session, began)
        )  # before anything is evaluated: the time may be too short
    folder.mkdir(parents=True, exist_ok=True)
    if options.tune in ("lora", "prefix") and log is None:
        tuned.keep_first(session.model, folder / tuned.INITIAL)
    outcomes: dict[str, list[float]] = read_json(folder / OUTCOMES) if log else {}
    if not options.no_before and ("before" not in metrics or "before" not in outcomes):
        before, outcomes["before"] = _measure(session, folder, "before", 0)
        metrics = {"before": before}
        write_json(folder / METRICS, metrics)
        write_json(folder / OUTCOMES, outcomes)
    # What the step log records beside the options.
    described: dict[str, Any] = {_RULE: session.task.splits}
    if "dev" in session.splits:
        whole = len(session.splits["dev"])
        measured = log.header["run"].get(_MEASURED, whole) if log else measured_examples(options, options.steps, whole)
        session.limit("dev", measured)
        if measured < whole:
            described[_MEASURED] = measured
    options.eval_steps = evaluation_steps(options, options.steps)
    inference_peak = session.inference_peak()
    trained = methods.METHODS[options.method](session, whole_folder, log, {**settings(options), **described})
    if trained is None:
        return 130
    steps = trained.facts["steps"]
    if trained.facts["skipped_steps"] == steps:
        raise NonFiniteLossError(
            f"the loss or the step was not finite in all {steps} steps: nothing was learnt. Lower the learning rate (--lr)"
        )
    metrics = {
        **session.facts("train", options.method),
        **({"before": metrics["before"]} if "before" in metrics else {}),
    }
    metrics["test"], outcomes["after"] = _measure(session, folder, "after", trained.facts.get("best_step", steps))
    if "before" in outcomes:
        metrics["sign_test"] = sign_test(outcomes["before"], outcomes["after"])
    metrics.update(trained.facts, inference_peak_memory_bytes=inference_peak)
    if not workers.is_first:  # its log stays
        workers.wait()
        return 0
    save_model(session.model, session.tokenizer, folder)
    write_lines(folder / HISTORY, trained.history)
    write_json(folder / OUTCOMES, outcomes)
    write_json(folder / METRICS, metrics)
    workers.wait()
    return _report(metrics, folder, options.method, parsed.json)


def _require_writable(folder: Path, workers: Alone) -> None:
    """Raise InputError if a rank could not write its folder, which would show when all have loaded the model."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if workers.count > 1 and not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(
            f"cannot write to {there}: every rank keeps the log, so give an --output-dir that all can write, on a "
            "common disk or on the disk of each machine"
        )


def _starts_again(folder: Path, workers: Alone) -> bool:
    """Whether a launcher has started this run again, which then goes on."""
    return Launch.read().restarts > 0 and any_has_log(folder / STEP_LOG, workers)


def _measure(session: Session, folder: Path, what: str, step: int) -> tuple[dict[str, float], list[float]]:
    """Measure the test split after so many steps: as a whole, and by example. Keeps what was written for the first of them."""
    outcomes: list[float] = []
    texts: list[str] = []
    measured = session.evaluate(what, outcomes=outcomes, completions=texts)
    if session.options.log_completions:
        own: dict[str, Any] = {"step": step, "split": "test"}
        kept = [line for line in read_lines(folder / COMPLETIONS) if not own.items() <= line.items()]
        judged = zip(session.splits["test"][:_SAMPLES], texts, outcomes, strict=False)
        new = [
            {**own, "prompt": e.example.prompt, "completion": text, "objective": {session.metric: value}}
            for e, text, value in judged
        ]
        write_lines(folder / COMPLETIONS, [*kept, *new])
    return measured, outcomes


def _steps(session: Session, began: float) -> int:
    """The steps of a run that was not told them."""
    options = session.options
    if options.method == "adam":
        return max(1, _ADAM_EPOCHS * len(session.splits["train"]) // options.batch_size)
    if not options.time_budget:
        return STEPS
    cost = measure(session)
    left = options.time_budget - (time.monotonic() - began)
    steps = steps_of_budget(left, cost, session)
    last = len(session.splits["test"]) + measured_examples(options, steps, len(session.splits.get("dev", ())))
    session.deadline = began + options.time_budget - last * cost.evaluation
    say(f"{cost.step:.2f} s a step: {steps} steps fit the {duration(left)} that are left")
    return steps


def _is_done(options: Train, log: Log, metrics: dict[str, Any]) -> bool:
    """Whether a run has all its steps, or ended early as it was told to, and no more are asked for."""
    steps = options.steps or log.header["run"]["steps"]
    return bool(log.steps >= steps or ("stopped" in metrics and steps <= log.header["run"]["steps"]))


def _resumed(asked: dict[str, Any], folder: Path) -> tuple[Log, dict[str, Any]]:
    """The log of the run in the folder, and the run's settings: the log's, with what was asked for that may change."""
    if asked.get("method") == "adam":
        raise InputError("--method adam keeps no step log to resume from: run it again in a new folder")
    if not (folder / "steps.jsonl").is_file():
        raise InputError(f"{folder} holds no run to resume (no steps.jsonl): start one without --resume")
    log = read_log(folder / "steps.jsonl")
    header = log.header["run"]
    if "task" not in header:
        raise InputError(
            f"the run in {folder} was not started by forwardtune train: go on with it in Python, by "
            "MeZOTrainer.train(resume_from_checkpoint=True), StepLog.resume or AutoLR.resume"
        )
    objective = str(header.get("objective"))
    if "objective" not in asked and ":" in objective:  # a log may come from anyone
        raise InputError(
            f"the run in {folder} is rewarded by {objective}, which is code, and is not imported because a log names it. "
            f"If you know it, name it again: {resume_command(folder, objective)}"
        )
    run = {}
    for name, one in options_of(Train).items():
        recorded, wanted = header.get(name), asked.get(name)
        if one.is_place and not one.free:
            recorded = _absolute({name: recorded})[name]
            if recorded is not None and Path(recorded).is_absolute() and not Path(recorded).exists():
                if wanted is None:
                    raise InputError(
                        f"the run in {folder} has --{name} {recorded}, which is not there: say where it is now"
                    )
                if Path(wanted).name == Path(recorded).name:
                    recorded = wanted  # it was moved; a model is known by the digest of its weights
        if wanted is not None and wanted != recorded and not one.free:
            raise InputError(
                f"the run in {folder} has {flag(name)} {recorded}, not {wanted}: leave the option out to "
                "resume it, or start another run in another folder"
            )
        run[name] = recorded if wanted is None else wanted
    recorded, rule = header.get(_RULE, DEFAULT_RULE), get_task(run["task"]).splits
    if recorded != rule:
        raise InputError(
            f"the run in {folder} has splits drawn by the rule {recorded}, and task {run['task']} now says {rule}: resume "
            f"it with a task file that says 'splits: {recorded}', or start another run in another folder"
        )
    return log, run


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, in which what is a file or a folder here has a path that holds anywhere."""
    absolute = dict(settings)
    for name, value in settings.items():
        if options_of(Train)[name].is_place and value not in (None, EMBEDDED_MODEL, *task_names()):
            path = Path(value).expanduser()
            absolute[name] = os.path.abspath(path) if path.exists() else value
    return absolute


def _report(metrics: dict[str, Any], folder: Path, method: str, as_json: bool) -> int:
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
    say(f"model, {'steps.jsonl' if method == 'mezo' else HISTORY} and {METRICS} are in {folder}")
    if as_json:
        print(json.dumps(plain(metrics)))
    return 0
