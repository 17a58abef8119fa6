"""``forwardtune plan``: what a run would cost, measured before anything runs."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import memory
from ..auto import AUTO, SHARE, first_settings
from ..durations import duration
from ..errors import InputError
from ..evaluation import evaluate, prepare
from ..noise import compile_kernels
from ..optimizer import MeZO
from ..rules import get_rule
from . import methods, say, train
from .results import plain
from .session import Session, open_session

# Steps that are timed, after one that warms up.
_TIMED = 3
# Examples that time an evaluation.
_EXAMPLES = 32
_SPANS = (600.0, 3600.0, 8 * 3600.0)


@dataclass(frozen=True)
class Cost:
    """What a run's parts cost here.

    Attributes:
        step: seconds of a step, the median of three.
        evaluation: seconds to evaluate an example.
        bytes_now: memory with the model loaded.
        bytes_inference: peak memory of a forward pass over the longest minibatch.
        bytes_step: peak memory of a step on it.
    """

    step: float
    evaluation: float
    bytes_now: int
    bytes_inference: int
    bytes_step: int


def add_commands(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = commands.add_parser("plan", help="say what train would cost: memory, time, and the steps that fit a time")
    train.add_options(parser)
    parser.set_defaults(run=run, output_dir=None, resume=False)


def run(options: argparse.Namespace) -> int:
    """Measure three steps and an evaluation, and say what follows."""
    given = _flags(options)
    train.settle(options)
    if options.method != "mezo":
        raise InputError(f"plan measures steps of --method mezo, not of {options.method}: leave --method out")
    prepare_model = partial(methods.prepare_model, options=options, first=None)
    session = open_session(options, "train", "dev", "test", prepare_model=prepare_model)
    cost = measure(session)
    wanted = options.steps or train.STEPS
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
        wanted = steps_within(options.time_budget, cost, session)
        facts["time_budget_seconds"] = options.time_budget
    facts["steps"], facts["seconds"] = wanted, seconds_of_run(wanted, cost, session)
    _tell(facts, cost, session, given)
    if options.json:
        print(json.dumps(plain(facts)))
    return 0


def measure(session: Session) -> Cost:
    """Time steps and an evaluation, and measure memory. The weights stay as they are, to the bit."""
    options, model = session.options, session.model
    device = model.device
    now = memory.now(device)
    inference = session.inference_peak()
    objective = methods.make_objective(session)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = MeZO(
        model,
        lr=1e-6,
        eps=first_settings(names)[1] if options.eps == AUTO else options.eps,
        probes=options.probes,
        direction=options.direction,
        perturbation=methods.perturbation_of(session, objective),
        seed=options.seed,
        estimator=options.estimator,
        normalize=options.normalize,
        rule=get_rule(options.rule, **({"state": options.rule_state} if options.rule in ("momentum", "adam") else {})),
    )
    weights = [tensor.parameter for tensor in optimizer.tuned]
    compile_kernels(weights, buffered=options.rule != "sgd", announce=say)
    model.eval()
    train_split = session.splits["train"]

    def step(examples: Any) -> float:
        batch = {**prepare(model, session.tokenizer, examples, session.layout), "examples": examples}

        def loss() -> float:
            return 0.0 * float(objective(model, batch).mean())  # equal losses: the update runs, and moves nothing

        began = time.perf_counter()
        optimizer.step(loss)
        return time.perf_counter() - began

    memory.reset_peak(device)
    step(sorted(train_split, key=lambda example: example.length)[-options.batch_size :])
    peak = memory.peak(device)
    fill_window(optimizer)
    draw = random.Random(options.seed)
    seconds = sorted(step(draw.sample(train_split, min(options.batch_size, len(train_split)))) for _ in range(_TIMED))
    examples = session.splits["test"][:_EXAMPLES]
    began = time.perf_counter()
    evaluate(
        model, session.tokenizer, session.task, examples,
        batch_size=options.batch_size, layout=session.layout, rewards=session.rewards,
    )  # fmt: skip
    return Cost(seconds[_TIMED // 2], (time.perf_counter() - began) / len(examples), now, inference, peak)


def fill_window(optimizer: MeZO) -> None:
    """Let a rule that averages over a window remember as many steps as in the long run, each as the one that was taken."""
    history, window = optimizer.history, getattr(optimizer.rule, "window", None)
    if window:
        history.recent = history.recent[-1:] * window


def seconds_of_run(steps: int, cost: Cost, session: Session) -> float:
    """Seconds that a run of so many steps takes, with its evaluations."""
    search = SHARE if AUTO in (session.options.lr, session.options.eps) else 0.0
    return steps * cost.step * (1 + search) + _beside(steps, cost, session)


def steps_within(seconds: float, cost: Cost, session: Session) -> int:
    """The most steps of a run that takes no longer than that; at least 1."""
    least, most = 1, 2
    while seconds_of_run(most, cost, session) <= seconds:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if seconds_of_run(middle, cost, session) <= seconds else (least, middle)
    return least


def _beside(steps: int, cost: Cost, session: Session) -> float:
    """Seconds of the evaluations: the test split before and after, the development split every so many steps."""
    options = session.options
    tests = 1 if options.no_before else 2
    every = train.evaluation_steps(options, steps)
    measurements = 1 if every is None else (options.lr == AUTO) + -(-steps // every)
    dev = train.measured_examples(options, steps, len(session.splits.get("dev", ())))
    examples = tests * len(session.splits["test"]) + measurements * dev
    return examples * cost.evaluation


def _flags(options: argparse.Namespace) -> str:
    """What the user gave, as it goes on to ``train``."""
    parts = []
    for name, value in vars(options).items():
        if name in ("run", "json", "output_dir", "resume", "steps", "time_budget") or value in (None, False):
            continue
        flag = f"--{name.replace('_', '-')}"
        parts.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(parts)


def _tell(facts: dict[str, Any], cost: Cost, session: Session, given: str) -> None:
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
    limit = f"--time-budget {options.time_budget:.0f}s" if options.time_budget else f"--steps {facts['steps']}"
    say(f"  forwardtune train {given} {limit} --output-dir DIR")
    if session.model.dtype == torch.float32:
        say("  --dtype bfloat16 halves the memory of the weights")
