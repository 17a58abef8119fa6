"""What a run's parts cost here, measured, and what follows for its time and its steps."""

from __future__ import annotations

import math
import random
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import memory
from ..averages import NONE, candidates
from ..config import AUTO, Train
from ..durations import duration
from ..errors import InputError
from ..forgetting import TOKENS, read_general, token_losses
from ..method.estimators import get_estimator
from ..method.rule import History, Rule
from ..models.feedback import FOR_A, WATCHES, rehearsed
from ..models.late import LATE
from ..models.tuning import LATE_ATTENTION
from ..noise import Count, Noise, Update
from ..optimizer import MeZO
from ..parameters import TunedTensor
from ..search.budget import MEASUREMENTS, SHARE, Plan
from ..storage import at_home_afterwards, device_of
from . import methods
from .dev import may_watch_by_loss
from .session import Session
from .tuned import input_of_walk, losses_of_walk

# Steps that are timed, after one that warms up.
_TIMED = 3
# Examples that time an evaluation.
_EXAMPLES = 32
# Characters that time the reading of a general text: a few windows.
_CHARACTERS = 4096
_LEAST_MEASURED = 64


@dataclass(frozen=True)
class Cost:
    """What a run's parts cost here.

    Attributes:
        step: seconds of a step, the median of three.
        update: seconds of its update, in them.
        evaluation: seconds to evaluate an example.
        bytes_now: memory with the model loaded.
        bytes_inference: peak memory of a forward pass over the longest minibatch.
        bytes_step: peak memory of a step on it.
        general: seconds to read the general text once.
        layers: seconds to measure the gradients of layers, by which directions are modified.
        watched: seconds to measure a development example beside the steps; by default those to evaluate one.
        start: seconds of the walk that LoRA starts from, without its looks at the development split.
    """

    step: float
    update: float
    evaluation: float
    bytes_now: int
    bytes_inference: int
    bytes_step: int
    general: float = 0.0
    layers: float = 0.0
    watched: float | None = None
    start: float = 0.0

    @property
    def watching(self) -> float:
        """Seconds to measure a development example beside the steps."""
        return self.evaluation if self.watched is None else self.watched


def measure(session: Session) -> Cost:
    """Time steps and an evaluation, and measure memory. The weights stay as they are, to the bit."""
    options, model = session.options, session.model
    device = device_of(model)
    memory.trim()  # what loading left behind is no part of what is held
    now = memory.now(device)
    inference = session.inference_peak()
    start, peak_of_walk = 0.0, 0
    if passes_of_walk(options):  # before the steps, as in a run: what those leave behind is no part of it
        memory.trim()
        memory.reset_peak(device)
        start, peak_of_walk = _walk(session), memory.peak(device)
        memory.trim()
    with tempfile.TemporaryDirectory() as folder:  # Trainer wants one
        trainer = methods.make_trainer(session, Path(folder), methods.make_objective(session), 1)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, MeZO)
    optimizer.rule = rule = Rehearsed(optimizer.rule)
    optimizer.probes_rise = 0  # steps as they are behind the rise
    trainer.current_gradient_accumulation_steps = 1

    began = clock(device)
    if optimizer.lacks_layers:
        from ..hf.automatic import held_out

        optimizer.measure_layers(held_out(trainer, 1))
    layers = clock(device) - began if options.modify_by == "gradients" else 0.0

    def estimate(examples: Any) -> None:
        trainer.training_step(model, trainer.data_collator(examples))

    memory.reset_peak(device)
    estimate(session.longest)
    peak = max(memory.peak(device), now)  # the system may count them a page apart
    optimizer.step()
    peak += sum(m.nbytes for moments in optimizer.history.moments.values() for m in moments)
    peak = max(peak, peak_of_walk)
    fill_window(optimizer)
    draw, train = random.Random(options.seed), session.splits["train"]
    steps, updates = [], []
    for _ in range(_TIMED):
        examples = draw.sample(train, min(options.batch_size, len(train)))
        rule.seconds = rule.seconds_beside = 0.0
        began = clock(device)
        estimate(examples)
        optimizer.step()
        steps.append(clock(device) - began - rule.seconds_beside)
        updates.append(rule.seconds)
    evaluation = _evaluation(session)
    watched = _evaluation(session, loss_alone=True) if may_watch_by_loss(session) else None
    step, update = median(steps), median(updates)
    return Cost(step, update, evaluation, now, inference, peak, _general(session), layers, watched, start)


def _walk(session: Session) -> float:
    """Seconds of the walk that LoRA starts from. Some of it is done; the weights stay as they are."""
    options, train, device = session.options, session.splits["train"], device_of(session.model)
    draw = random.Random(options.seed)
    some = [draw.sample(train, min(options.batch_size, len(train))) for _ in range(_TIMED - 1)]
    longest, *usual = (input_of_walk(session, examples) for examples in (session.longest, *some))
    first, step = rehearsed(session.model, longest, usual, *losses_of_walk(session), lambda: clock(device))
    return first + step / _passes_of_a_step(options) * (passes_of_walk(options) - 1 - LATE)


def _evaluation(session: Session, **how: Any) -> float:
    """Seconds to evaluate an example."""
    examples = session.splits["test"][:_EXAMPLES]
    began = time.perf_counter()
    session.measure(examples, **how)
    return (time.perf_counter() - began) / len(examples)


def _general(session: Session) -> float:
    """Seconds to read the general text of a run, by its beginning."""
    if session.options.general_text is None:
        return 0.0
    text = read_general(session.options.general_text)
    tokens = len(session.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    began = time.perf_counter()
    read = len(token_losses(session.model, session.tokenizer, text[:_CHARACTERS]))
    return (time.perf_counter() - began) * min(tokens, TOKENS) / read


class Rehearsed(Rule):
    """Takes every step as another rule would, and takes it back: what steps cost, with weights that stay, to the bit.

    All coefficients count as 1. One that happens to be 0, as those of an accuracy often are, would cost nothing.

    Attributes:
        seconds: of the updates themselves.
        seconds_beside: of keeping the weights and bringing them back, a tensor at a time.
    """

    name = "rehearsed"

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.window: int | None = getattr(rule, "window", None)
        self.seconds = self.seconds_beside = 0.0

    @property
    def remembers(self) -> bool:
        return self._rule.remembers

    def plan(self, step: int, coefficients: Sequence[float], lr: float, weight_decay: float) -> Update:
        return self._rule.plan(step, [1.0] * len(coefficients), lr, weight_decay)

    def move(
        self, noise: Noise, tensor: TunedTensor, updates: Sequence[Update], history: History, *, keep: bool
    ) -> Count:
        weight = tensor.parameter.detach()
        times = [clock(tensor.device)]
        kept = weight.clone() if weight.device.type == "cpu" else weight.cpu()
        times.append(clock(tensor.device))
        if self._rule.decay_towards == "base":  # the weights stay those of the beginning
            history = replace(history, base=lambda lo, hi: kept.view(-1)[lo:hi])
        with at_home_afterwards([tensor.home]):
            unchanged = self._rule.move(noise, tensor, updates, history, keep=keep)
        times.append(clock(tensor.device))
        weight.copy_(kept)
        times.append(clock(tensor.device))
        self.seconds += times[2] - times[1]
        self.seconds_beside += times[1] - times[0] + times[3] - times[2]
        return unchanged


def clock(device: torch.device) -> float:
    """Seconds, when all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fill_window(optimizer: MeZO) -> None:
    """Let a rule that averages over a window remember as many steps as in the long run, each as the one that was taken."""
    history, window = optimizer.history, getattr(optimizer.rule, "window", None)
    if window:
        history.recent = history.recent[-1:] * window


def seconds_of_run(steps: int, cost: Cost, session: Session) -> float:
    """Seconds that a run of so many steps takes at most, with its evaluations.

    A run that finds its learning rate also tries the first steps with several, and may replay every step once on its ways back.
    """
    options, whole = session.options, steps_at_full_probes(steps, session.options)
    search = SHARE if AUTO in (options.lr, options.eps) else 0.0
    again = whole + _plan(steps, options).updates if options.lr == AUTO else 0
    every = evaluation_steps(options, steps)
    measurements = 0 if every is None else (options.lr == AUTO) + -(-steps // every) - 1  # and one behind the last step
    before = 0 if options.no_before else len(session.splits["test"])
    if cost.start:
        measurements += WATCHES + 1
    beside = measurements * _dev(steps, session) * cost.watching + before * cost.evaluation + cost.general + cost.layers
    forward = (whole + steps * search) * cost.step + cost.start
    return forward + again * cost.update + beside + seconds_behind(steps, cost, session)


def passes_of_walk(options: Train) -> float:
    """Forward passes of the walk that LoRA starts from: its steps, and the minibatches that A is taken from, in which late layers run twice."""
    if options.tune != "lora" or options.lora_init != "feedback":
        return 0
    return options.feedback_steps * _passes_of_a_step(options) + (1 + LATE) * min(FOR_A, options.feedback_steps)


def _passes_of_a_step(options: Train) -> float:
    """Attention of late layers is about a quarter of them, and its derivative takes as much as three passes."""
    return 1 + LATE * 3 / 4 if LATE_ATTENTION in (options.lora_targets or "") else 1


def seconds_behind(steps: int, cost: Cost, session: Session) -> float:
    """Seconds of what follows the last of so many steps: measuring, and averages, each a replay, the best of several once more."""
    options = session.options
    averages = len(candidates(steps)) if options.average == AUTO else int(options.average != NONE)
    replays = averages + (options.average == AUTO)
    dev, evaluated = _dev(steps, session), len(session.splits["test"])
    if cost.watched is not None:  # the weights that are kept are measured once more, with the metric
        evaluated += dev
    measuring = (1 + averages) * dev * cost.watching + evaluated * cost.evaluation
    return measuring + cost.general + replays * steps_at_full_probes(steps, options) * cost.update


def steps_at_full_probes(steps: int, options: Train) -> float:
    """How many steps at all probes cost what the first so many of a run do, in which their number rises."""
    rise, probes = options.probes_rise, options.probes
    return steps - sum(1 - max(1, probes * step // rise) / probes for step in range(min(steps, rise)))


def steps_within(seconds: float, cost: Cost, session: Session) -> int:
    """The most steps of a run that takes no longer than that; 0 if not even one does."""
    return bisect_right(range(1, 2**40), seconds, key=lambda steps: seconds_of_run(steps, cost, session))


def steps_of_budget(left: float, cost: Cost, session: Session) -> int:
    """The steps of a run with ``--time-budget`` of which so many seconds are left.

    Raises:
        InputError: they are too few for a step, or for finding the learning rate.
    """
    options = session.options
    steps, least = steps_within(left, cost, session), 1
    if options.lr == AUTO:
        least = next(n for n in count(1) if _plan(n, options).searches)
    if steps < least:
        # A tenth more, as times differ from run to run.
        needed = options.time_budget - left + seconds_of_run(least, cost, session)
        why = f"finding a learning rate takes {least} steps or more" if least > 1 else "that is none"
        raise InputError(
            f"--time-budget {duration(options.time_budget)} leaves room for {steps} steps of {cost.step:.2f} s beside loading "
            f"and evaluating, and {why}: give --time-budget {math.ceil(1.1 * needed)}s or more"
            + (", or a learning rate (--lr)" if least > 1 else "")
        )
    return steps


def steps_of_epochs(epochs: float, session: Session) -> int:
    """The steps of so many passes over the training examples, the last minibatch of each as small as it may be."""
    return math.ceil(epochs * math.ceil(len(session.splits["train"]) / session.options.batch_size))


def _plan(steps: int, options: Train) -> Plan:
    estimator = get_estimator(options.estimator, 1.0, options.probes, options.normalize, options.assignment)
    return Plan.of(steps, len(estimator.queries()), find_eps=options.eps == AUTO)


def _dev(steps: int, session: Session) -> int:
    return measured_examples(session.options, steps, len(session.splits.get("dev", ())))


def evaluation_steps(options: Train, steps: int) -> int | None:
    """Steps between measurements of the development split: as told, or 20 in a run that finds its learning rate."""
    if options.eval_steps is not None or options.lr != AUTO or options.dev_examples == 0:
        return options.eval_steps
    return max(1, steps // MEASUREMENTS)


def measured_examples(options: Train, steps: int, examples: int) -> int:
    """How many of the development examples are measured: all, unless the user said neither how many nor how often.

    Then 20 measurements take a quarter of the passes that the steps take, but at least 64 examples each.
    """
    if options.lr != AUTO or options.eval_steps is not None or options.dev_examples is not None:
        return examples
    return min(examples, max(_LEAST_MEASURED, steps * options.batch_size // (2 * MEASUREMENTS)))
