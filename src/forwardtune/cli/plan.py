"""``forwardtune plan``: what a run would cost, measured before anything runs, and what other ways to tune would."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import memory
from ..config import STEPS
from ..durations import duration
from ..errors import InputError
from ..forgetting import read_general
from ..models import checkpoint_format
from ..processes import Launch
from ..storage import device_of
from . import say, tuned, ways
from .costs import Cost, measure, seconds_of_run, steps_of_budget, steps_of_epochs, steps_within
from .options import Asked, ask
from .outlook import Outlook
from .results import plain
from .session import Session, open_session

_SPANS = (600.0, 3600.0, 8 * 3600.0)


def run(parsed: argparse.Namespace) -> int:
    """Measure three steps and an evaluation, and say what follows; then the other ways, in a table."""
    if Launch.read().count > 1:
        raise InputError(
            "plan measures the steps of one process, and the other ways one by one: start it without torchrun"
        )
    asked = ask(parsed, "plan")
    facts = _from_shapes(asked, parsed.memory) if parsed.no_weights else _measured(asked, parsed)
    if parsed.json:
        print(json.dumps(plain(facts)))
    return 0


def _from_shapes(asked: Asked, room: int | None) -> dict[str, Any]:
    """``--no-weights``: memory by ``config.json``, for a machine that need not be there."""
    if "task" not in asked.settings:
        asked = replace(asked, settings={**asked.settings, "task": ways.NO_TASK})
    rows = ways.rows_of(asked)
    outlook = Outlook(asked, rows, room, timed=False)
    if all(row.peak is None for row in rows):
        raise InputError("this model's forward pass asks for values, so nothing can be said of it without weights")
    ways.tell(rows, outlook, asked.value("time_budget"))
    return {"memory": outlook.room, "tokens": outlook.tokens, "ways": ways.facts_of(rows, outlook)}


def _measured(asked: Asked, parsed: argparse.Namespace) -> dict[str, Any]:
    """What this machine does."""
    began = time.monotonic()
    options = asked.describe()
    if options.general_text is not None:
        read_general(options.general_text)  # what cannot be read is refused before a model is loaded
    beside = not (parsed.alone or checkpoint_format(options.model))  # shapes do not say how a checkpoint is quantised
    rows = ways.rows_of(asked) if beside else []
    outlook = Outlook(asked, rows, parsed.memory, timed=True) if beside else None
    facts: dict[str, Any] = {}
    if outlook is not None and rows[0].fits(outlook.room) is False:
        rows[0].why = "it would not fit"
        say(f"{rows[0].title}: does not fit, and is not loaded")
    else:
        prepare_model = partial(tuned.prepare_model, options=options, first=None, given=asked.settings)
        session = open_session(options, "train", "dev", "test", prepare_model=prepare_model)
        cost = measure(session)
        facts = _facts(session, cost, began)
        _tell(facts, cost, session, asked.settings)
        if outlook is not None:
            rows[0].peak = cost.bytes_step
            outlook.take(rows[0], cost)
        del session  # and its model
    if outlook is not None:
        ways.measure_others(rows, outlook)
        ways.tell(rows, outlook, options.time_budget)
        facts["ways"] = ways.facts_of(rows, outlook)
    return facts


def _facts(session: Session, cost: Cost, began: float) -> dict[str, Any]:
    options = session.options
    wanted = steps_of_epochs(options.epochs, session) if options.epochs else options.steps or STEPS
    facts: dict[str, Any] = {
        **session.facts("plan", options.method),
        "seconds_per_step": cost.step,
        "seconds_per_update": cost.update,
        "seconds_per_evaluated_example": cost.evaluation,
        "seconds_per_watched_example": cost.watched,
        "seconds_of_general_text": cost.general,
        "seconds_of_layers": cost.layers,
        "seconds_of_start": cost.start,
        "memory_bytes": cost.bytes_now,
        "inference_peak_memory_bytes": cost.bytes_inference,
        "peak_memory_bytes": cost.bytes_step,
        "free_memory_bytes": memory.free(device_of(session.model)),
    }
    if options.time_budget:
        wanted = steps_of_budget(options.time_budget - (time.monotonic() - began), cost, session)
        facts["time_budget_seconds"] = options.time_budget
    facts["steps"], facts["seconds"] = wanted, seconds_of_run(wanted, cost, session)
    return facts


def _tell(facts: dict[str, Any], cost: Cost, session: Session, given: dict[str, Any]) -> None:
    mib, options, free = 2**20, session.options, facts["free_memory_bytes"]
    say()
    say(
        f"memory: {cost.bytes_now / mib:,.0f} MiB now, {cost.bytes_step / mib:,.0f} MiB at the peak of a step on the longest "
        f"examples (inference {cost.bytes_inference / mib:,.0f} MiB)"
        + (f"; {free / mib:,.0f} MiB are free" if free else "")
    )
    say(
        f"time: {cost.step:.2f} s a step, {cost.evaluation:.3f} s to evaluate an example"
        + (f", {cost.general:.0f} s to read the general text" if cost.general else "")
        + (f", {cost.layers:.0f} s to measure the layers' gradients" if cost.layers else "")
        + (f", {cost.start:.0f} s for the walk that LoRA starts from" if cost.start else "")
    )
    for span in _SPANS:
        say(f"  in {duration(span):>8}: {steps_within(span, cost, session):,} steps")
    say(f"{facts['steps']:,} steps take about {duration(facts['seconds'])}, evaluations included:")
    limit = f"--time-budget {options.time_budget:.0f}s" if options.time_budget else f"--steps {facts['steps']}"
    say(f"  forwardtune train {ways.words(given)} {limit} --output-dir DIR")
    if session.model.dtype == torch.float32:
        say("  --dtype bfloat16 halves the memory of the weights")
