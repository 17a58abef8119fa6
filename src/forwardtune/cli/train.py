"""``forwardtune train``: from a model and a task to a tuned model."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..averages import AUTO
from ..config import STEPS, Train, settings
from ..durations import duration
from ..errors import InputError, NonFiniteLossError
from ..evaluation import sign_test
from ..files import read_json, write_text
from ..forgetting import compared, read_general
from ..models import save_model
from ..names import FROM_EXAMPLES
from ..run_folder import (
    COMPLETIONS,
    DEV,
    GENERAL,
    HISTORY,
    INITIAL,
    LOG,
    METRICS,
    OUTCOMES,
    PREDICTIONS,
    TASK,
    TERMS,
    forgetting,
    read_lines,
)
from ..trajectory import Log, read_log
from ..trajectory.shared import share_log
from ..workers import Alone, workers_of_launch
from . import methods, say, tuned
from .callbacks import Trained
from .card import write_card
from .costs import evaluation_steps, measure, measured_examples, seconds_behind, steps_of_budget, steps_of_epochs
from .dev import may_watch_by_loss, usual_patience
from .options import ask, flag
from .predicted import Examined, examine, read_before, show_classes, write_predictions
from .results import move_aside, new_folder, peak_memory, plain, table, write_json, write_lines
from .resumed import RULE, absolute, is_done, resumed, starts_again
from .session import Session, open_session

_ADAM_EPOCHS = 5
# Where the step log keeps how many development examples are measured.
_MEASURED = "dev_measured"
# Parts of the model that text does not enter.
_FROZEN = "frozen"
# Whether the dev split has no metric beside the steps, as the user did not say how often it is measured.
_BY_LOSS = "dev_by_loss"
# What a run's folder may hold before its first step.
_FROM_THE_BEGINNING = (METRICS, OUTCOMES, PREDICTIONS, COMPLETIONS, INITIAL, TASK, GENERAL)
# Test examples of which the completions are kept.
_SAMPLES = 32


def run(parsed: argparse.Namespace) -> int:
    """Tune, evaluate before and after, and write model, step log and metrics."""
    began = time.monotonic()
    asked = ask(parsed, "train")
    if asked.output_dir is None:
        raise InputError("the following arguments are required: --output-dir, here or in the file of --config")
    if parsed.overwrite and parsed.resume:
        raise InputError("--overwrite begins anew and --resume goes on: leave one of them out")
    methods.require_trackers(asked.settings.get("report_to"))
    workers = workers_of_launch(asked.value("worker_timeout"))
    if parsed.overwrite and workers.count > 1:
        raise InputError(
            "--overwrite moves a folder, which several processes cannot do together: move it yourself first"
        )
    whole_folder, log = Path(asked.output_dir), None
    folder = workers.own(whole_folder)
    _require_writable(folder, workers)
    given = absolute(asked.settings)  # the log may be read in another folder
    resume = parsed.resume or starts_again(folder, workers)
    if resume:
        share_log(folder / LOG, workers, (*_FROM_THE_BEGINNING, DEV, TERMS))
        log, given = resumed(given, folder)
    options = asked.describe(given, resumed=resume)
    general = None if options.general_text is None else read_general(options.general_text)
    if workers.count > 1 and options.method == "adam":
        raise InputError("--method adam is a comparison, and runs in one process: start it without torchrun")
    if log is None:
        # A run that was killed before its first step leaves its first evaluation behind, and nothing else.
        begun = not read_json(folder / METRICS).keys() - {"before", "by_class"}
        leftovers = (*_FROM_THE_BEGINNING, "steps.jsonl.lock", "ranks") if begun else ()
        if parsed.overwrite:
            _require_outside(options, folder)
        else:
            new_folder(folder, leftovers=leftovers, resumable=True)
        workers.wait()  # whoever makes a folder in it comes later
    metrics = read_json(folder / METRICS) if log else {}
    if log and "test" in metrics and log.end and is_done(options, log, metrics):
        patient = " and a larger --patience" if metrics.get("stopped") == "patience" else ""
        say(
            f"the run in {folder} is complete after {log.steps} steps: nothing to do (more --steps{patient} would extend it)"
        )
        return _report(metrics, folder, options.method, parsed.json)
    if (
        log
        and log.end
        and "test" not in metrics
        and not asked.settings.keys() & {"steps", "epochs", "time_budget", "patience"}
    ):
        options.steps = log.steps  # a kill came behind the last one

    frozen: list[str] = []
    prepare = partial(
        tuned.prepare_model,
        options=options,
        first=folder / INITIAL if log else None,
        tensors=tuned.tensors_of(log) if log else None,
        frozen=frozen,
        given=None if log else given,
    )
    session = open_session(
        options, "train", "dev", "test", prepare_model=prepare, resumed=log, workers=workers, folder=folder
    )
    if options.average == AUTO and "dev" not in session.splits:
        raise InputError(
            "--average auto chooses on development examples, and the task has none: name one, such as last:100"
        )
    if options.steps is None:
        # Before anything is evaluated: the time may be too short.
        options.steps = workers.first(lambda: _steps(session, began))
    if parsed.overwrite and (aside := move_aside(folder)) is not None:
        say(f"what was in {folder} is in {aside} now")
    folder.mkdir(parents=True, exist_ok=True)
    if Path(options.task).is_file():
        write_text(folder / TASK, Path(options.task).read_text(encoding="utf-8-sig"))
    outcomes: dict[str, list[float]] = read_json(folder / OUTCOMES) if log else {}
    answers = read_before(folder) if log else None
    if not options.no_before and ("before" not in metrics or "before" not in outcomes or answers is None):
        before = _measure(session, folder, "before", 0)
        outcomes["before"], answers = before.outcomes, before.answers
        metrics = {"before": before.measured, **({"by_class": {"before": before.classes}} if before.classes else {})}
        write_json(folder / METRICS, metrics)
        write_json(folder / OUTCOMES, outcomes)
        write_predictions(folder, session, answers)
    if general is not None:
        token_losses = _general_before(session, folder, general, log)
    # What the step log records beside the options.
    described: dict[str, Any] = {RULE: session.task.splits, **({_FROZEN: frozen} if frozen else {})}
    if "dev" in session.splits:
        whole = len(session.splits["dev"])
        measured = log.header["run"].get(_MEASURED, whole) if log else measured_examples(options, options.steps, whole)
        session.limit("dev", measured)
        if measured < whole:
            described[_MEASURED] = measured
        session.watched_by_loss = bool(log.header["run"].get(_BY_LOSS)) if log else may_watch_by_loss(session)
        if session.watched_by_loss:
            described[_BY_LOSS] = True
    start_peak = 0
    if options.tune in ("lora", "prefix") and log is None:
        if options.lora_init in FROM_EXAMPLES:
            start_peak = session.peak_of(partial(tuned.start_from_examples, session))
        tuned.keep_first(session.model, folder / INITIAL)
    if options.patience is None and log is None:
        options.patience = usual_patience(options, session.task)
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
    kept: dict[str, Any] = {name: metrics[name] for name in ("before", "by_class") if name in metrics}
    metrics = {**session.facts("train", options.method), **kept}
    if session.watched_by_loss and "dev" in trained.facts:
        _complete(trained, session.evaluate("dev", "dev"))
    after = _measure(session, folder, "after", trained.facts.get("best_step", steps))
    metrics["test"], outcomes["after"] = after.measured, after.outcomes
    if after.classes:
        metrics["by_class"] = {**metrics.get("by_class", {}), "test": after.classes}
    if "before" in outcomes:
        metrics["sign_test"] = sign_test(outcomes["before"], outcomes["after"])
    if general is not None:
        token_losses["after"] = session.general_losses("general text after", general)
        metrics["general_text"] = {
            "text": options.general_text,
            **compared(token_losses["before"], token_losses["after"]),
        }
    metrics.update(trained.facts, inference_peak_memory_bytes=inference_peak)
    metrics["peak_memory_bytes"] = max(start_peak, metrics["peak_memory_bytes"])
    if not workers.is_first:  # its log stays
        workers.wait()
        return 0
    save_model(session.model, session.tokenizer, folder)
    write_lines(folder / HISTORY, trained.history)
    write_json(folder / OUTCOMES, outcomes)
    write_predictions(folder, session, answers, after.answers)
    if general is not None:
        write_json(folder / GENERAL, token_losses)
    write_json(folder / METRICS, metrics)
    write_card(folder, session, plain(metrics), read_log(folder / LOG) if (folder / LOG).is_file() else None)
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


def _measure(session: Session, folder: Path, what: str, step: int) -> Examined:
    """Measure the test split after so many steps. Keeps what was written for the first of them, if that is logged."""
    examined = examine(session, what)
    if session.options.log_completions:
        own: dict[str, Any] = {"step": step, "split": "test"}
        kept = [line for line in read_lines(folder / COMPLETIONS) if not own.items() <= line.items()]
        judged = zip(session.splits["test"][:_SAMPLES], examined.answers, examined.outcomes, strict=False)
        new = [
            {**own, "prompt": e.example.prompt, "completion": said["completion"], "objective": {session.metric: value}}
            for e, said, value in judged
            if "completion" in said
        ]
        write_lines(folder / COMPLETIONS, [*kept, *new])
    return examined


def _complete(trained: Trained, dev: dict[str, float]) -> None:
    """Give the development split of the weights that are kept its metric, in the facts and in the course of the run."""
    trained.facts["dev"] = dev
    for line in trained.history:
        if "dev" in line and line["step"] == trained.facts.get("best_step"):
            line["dev"] = dev


def _general_before(session: Session, folder: Path, text: str, log: Log | None) -> dict[str, Any]:
    """The loss of each token of a general text by the untuned model; of a run that goes on, as it was measured, if of this text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    known = read_json(folder / GENERAL) if log else {}
    if known.get("digest") != digest:
        known = {"digest": digest, "before": session.general_losses("general text before", text)}
        write_json(folder / GENERAL, known)
    return known


def _steps(session: Session, began: float) -> int:
    """The steps of a run that was not told them."""
    options = session.options
    if options.epochs:
        return steps_of_epochs(options.epochs, session)
    if options.method == "adam":
        return max(1, _ADAM_EPOCHS * len(session.splits["train"]) // options.batch_size)
    if not options.time_budget:
        return STEPS
    cost = measure(session)
    left = options.time_budget - (time.monotonic() - began)
    steps = steps_of_budget(left, cost, session)
    session.deadline = began + options.time_budget - seconds_behind(steps, cost, session)
    say(f"{cost.step:.2f} s a step: {steps} steps fit the {duration(left)} that are left")
    return steps


def _require_outside(options: Train, folder: Path) -> None:
    """Raise InputError if the folder that is to be moved aside is the command's own, or holds what the run reads."""
    whole = folder.resolve()
    for name in ("model", "task", "data_dir"):
        place = getattr(options, name)
        if place is not None and Path(place).exists() and whole in (path := Path(place).resolve(), *path.parents):
            raise InputError(f"{folder} holds the {flag(name)} of the run: choose another --output-dir")
    if whole in (here := Path.cwd(), *here.parents):
        raise InputError(f"{folder} is where the command runs: choose another --output-dir")


def _report(metrics: dict[str, Any], folder: Path, method: str, as_json: bool) -> int:
    """Say what came of it."""
    say()
    table({name: metrics[key] for name, key in (("before", "before"), ("after", "test")) if key in metrics})
    show_classes(metrics.get("by_class", {}).get("test", {}))
    say()
    if told := forgetting(metrics):
        say(told)
    if test := metrics.get("sign_test"):
        say(
            f"{test['better']} examples came out better, {test['worse']} worse: p = {test['p_value']:.1e} by the sign test"
        )
    pages = ", pages of the file with the weights included" if metrics["settings"].get("offload") == "disk" else ""
    say(f"peak memory {peak_memory(metrics)}{pages}")
    say(f"{metrics['seconds']:.0f} s in {metrics['steps']} steps, {metrics['seconds_per_step']:.2f} s a step")
    if "average" in metrics:
        say(f"the weights are the average {metrics['average']} of those of the run")
    elif metrics.get("best_step") == 0:
        say("the weights are untuned: no step was better on the dev split")
    elif metrics.get("best_step", metrics["steps"]) != metrics["steps"]:
        say(f"the weights are those of step {metrics['best_step']}, which was best on the dev split")
    say(f"model, {HISTORY if method == 'adam' else LOG} and {METRICS} are in {folder}")
    _say_what_next(folder, answers="token_accuracy" not in metrics["test"])
    if as_json:
        print(json.dumps(plain(metrics)))
    return 0


def _say_what_next(folder: Path, *, answers: bool) -> None:
    """Show the commands that most users want now; conversations have no answers to predict."""
    run = shlex.quote(str(folder))
    say("\nnext:")
    if answers:
        say(f"  forwardtune predict --model {run} --input NEW.csv --output ANSWERS.csv")
    say(f"  forwardtune chat --model {run} --compare")
    say(f"  forwardtune report {run}")
