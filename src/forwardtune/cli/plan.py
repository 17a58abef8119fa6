"""``forwardtune plan``: what a run would cost, measured before anything runs."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from functools import partial
from typing import Any

import torch

from .. import memory
from ..config import STEPS
from ..durations import duration
from . import say, tuned
from .costs import Cost, measure, seconds_of_run, steps_of_budget, steps_of_epochs, steps_within
from .options import ask, flag
from .results import plain
from .session import Session, open_session

_SPANS = (600.0, 3600.0, 8 * 3600.0)


def run(parsed: argparse.Namespace) -> int:
    """Measure three steps and an evaluation, and say what follows."""
    began = time.monotonic()
    asked = ask(parsed, "plan")
    options = asked.describe()
    prepare_model = partial(tuned.prepare_model, options=options, first=None)
    session = open_session(options, "train", "dev", "test", prepare_model=prepare_model)
    cost = measure(session)
    wanted = steps_of_epochs(options.epochs, session) if options.epochs else options.steps or STEPS
    facts: dict[str, Any] = {
        **session.facts("plan", options.method),
        "seconds_per_step": cost.step,
        "seconds_per_evaluated_example": cost.evaluation,
        "memory_bytes": cost.bytes_now,
        "inference_peak_memory_bytes": cost.bytes_inference,
        "peak_memory_bytes": cost.bytes_step,
        "free_memory_bytes": memory.free(session.model.device),
    }
    if options.time_budget:
        wanted = steps_of_budget(options.time_budget - (time.monotonic() - began), cost, session)
        facts["time_budget_seconds"] = options.time_budget
    facts["steps"], facts["seconds"] = wanted, seconds_of_run(wanted, cost, session)
    _tell(facts, cost, session, asked.settings)
    if parsed.json:
        print(json.dumps(plain(facts)))
    return 0


def _tell(facts: dict[str, Any], cost: Cost, session: Session, given: dict[str, Any]) -> None:
    mib, options, free = 2**20, session.options, facts["free_memory_bytes"]
    say()
    say(
        f"memory: {cost.bytes_now / mib:,.0f} MiB now, {cost.bytes_step / mib:,.0f} MiB at the peak of a step on the longest "
        f"examples (inference {cost.bytes_inference / mib:,.0f} MiB)"
        + (f"; {free / mib:,.0f} MiB are free" if free else "")
    )
    say(f"time: {cost.step:.2f} s a step, {cost.evaluation:.3f} s to evaluate an example")
    for span in _SPANS:
        say(f"  in {duration(span):>8}: {steps_within(span, cost, session):,} steps")
    say(f"{facts['steps']:,} steps take about {duration(facts['seconds'])}, evaluations included:")
    flags = [
        flag(name) if value is True else f"{flag(name)} {shlex.quote(str(value))}"
        for name, value in given.items()
        if name not in ("steps", "epochs", "time_budget")
    ]
    limit = f"--time-budget {options.time_budget:.0f}s" if options.time_budget else f"--steps {facts['steps']}"
    say(f"  forwardtune train {' '.join(flags)} {limit} --output-dir DIR")
    if session.model.dtype == torch.float32:
        say("  --dtype bfloat16 halves the memory of the weights")
