"""Rules for a learning rate that follows held-out losses, compared by simulation.

    python benchmarks/rates.py              # six problems, three lengths: some minutes
    python benchmarks/rates.py --seeds 4    # a smoke test

A network of two layers (1,600 to 1,800 weights) is tuned by SPSA with one probe on drawn examples, 8 or 16 a minibatch, and measured on 48
others, which choose the weights that are kept, and at the end on 2,000 more (test). The problems differ in how wrong the untuned network is
and in the noise of the labels. Eleven constant rates, a factor of the square root of ten apart, take all the steps; the best of them, by
the mean over seeds of the fall of the held-out loss, is 100%, and so is the best by that of the test loss. Runs that find
their rate take 86% of the steps. They are those of the library, its ``RateSearch`` with numpy in the place of a model: the line search over held steps,
then the watch with other numbers. After each of so many measurements the rate is multiplied by ``rise`` if the loss is the lowest so
far, else divided by ``fall`` while the run goes back to the best point, at once or after ``patience`` measurements; if the loss is hardly
higher, as ``Guard`` has it, it is multiplied by ``nudge`` instead, or the run ``goes on``, and the rate falls after so many of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from machine import parser, write

from forwardtune.search.budget import Plan
from forwardtune.search.guard import FALL, RISE, GoBack, Guard
from forwardtune.search.line_search import RATIO
from forwardtune.search.rates import RateSearch, first_rate

EPS, HELD, SHARE, TRIES, SEARCHED = 1e-3, 8, 0.86, 5, 24
FEATURES, HIDDEN, DEV, TRAIN, TEST = 48, 32, 48, 1000, 2000
GRID = [1e-2 * RATIO**k for k in range(-8, 3)]


@dataclass(frozen=True)
class Kind:
    """How a problem is drawn: ``bias`` of the first class and ``scale`` of the untuned logits, ``noise`` share of random labels."""

    classes: int
    bias: float
    scale: float
    noise: float


KINDS = {
    "badly calibrated": Kind(2, 3.0, 0.3, 0.1),
    "five classes, badly calibrated": Kind(5, 4.0, 0.5, 0.1),
    "weak signal": Kind(2, 0.5, 0.3, 0.5),
    "strong signal": Kind(2, 0.5, 0.5, 0.1),
    "three classes": Kind(3, 1.0, 1.0, 0.2),
    "sure and wrong": Kind(3, 0.0, 2.0, 0.2),
}


@dataclass(frozen=True)
class Rule:
    rise: float
    fall: float
    measurements: int = 20
    patience: int = 1
    nudge: float | None = None
    goes_on: int | None = None

    def guard(self, lr: float, step: int) -> Guard:
        """The library's watch with these numbers."""
        kind = Patient if self.patience > 1 else Guard
        slight = 1 / self.fall if self.nudge is None else self.nudge
        return kind(lr, step, rise=self.rise, fall=self.fall, slight=slight, patience=self.goes_on)

    def __str__(self) -> str:
        extra = f", patience {self.patience}" if self.patience > 1 else ""
        extra += f", nudge {self.nudge:g}" if self.nudge else ""
        extra += f", goes on {self.goes_on} times" if self.goes_on else ""
        return f"rise {self.rise:g}, fall {self.fall:.3g}, {self.measurements} measurements{extra}"


RULES = [
    Rule(RISE, FALL, nudge=1.0),
    Rule(RISE, FALL),
    Rule(RISE, FALL, nudge=1.25),
    Rule(RISE, 2.0, nudge=1.0),
    Rule(1.0, FALL, nudge=1.0),
    Rule(1.25, FALL, nudge=1.0),
    Rule(1.35, FALL, nudge=1.0),
    Rule(1.75, FALL, nudge=1.0),
    Rule(1.75, FALL, nudge=1.5),
    Rule(2.0, FALL, nudge=1.0),
    Rule(1.0, RATIO, patience=2),
    Rule(RISE, FALL, nudge=1.0, goes_on=2),
    Rule(1.25, FALL, nudge=1.0, goes_on=2),
    Rule(RISE, FALL, measurements=10, nudge=1.0),
    Rule(RISE, FALL, measurements=40, nudge=1.0),
]


class Problem:
    """One drawing of a problem, with its minibatches and directions."""

    def __init__(self, kind: Kind, seed: int, steps: int, batch: int) -> None:
        draw = np.random.default_rng([seed, steps])
        spectrum = np.arange(1, FEATURES + 1) ** -0.7
        centre = draw.standard_normal(FEATURES) * spectrum
        teacher = 2 * draw.standard_normal((FEATURES, kind.classes))

        def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
            x = draw.standard_normal((count, FEATURES)) * spectrum + centre
            labels = np.argmax((x - centre) @ teacher, axis=1)
            random = draw.random(count) < kind.noise
            labels[random] = draw.integers(kind.classes, size=int(random.sum()))
            return x, labels

        first = draw.standard_normal((FEATURES, HIDDEN)) / math.sqrt(FEATURES)
        second = 3 * kind.scale * draw.standard_normal((HIDDEN, kind.classes)) / math.sqrt(HIDDEN)
        bias = np.zeros(kind.classes)
        bias[0] = kind.bias
        self.base = np.concatenate([first.ravel(), second.ravel(), bias])
        self.classes = kind.classes
        self.dev, self.train, self.test = examples(DEV), examples(TRAIN), examples(TEST)
        self.minibatches = draw.integers(TRAIN, size=(steps, batch))
        self.steps, self._seed = steps, int(draw.integers(2**31))

    def losses(self, weights: np.ndarray, examples: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        x, labels = examples
        cut = FEATURES * HIDDEN
        first, second = weights[:cut].reshape(FEATURES, HIDDEN), weights[cut : -self.classes].reshape(HIDDEN, -1)
        logits = np.tanh(x @ first) @ second + weights[-self.classes :]
        top = logits.max(axis=1)
        return top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(labels)), labels]

    def held_out(self, weights: np.ndarray, count: int = DEV) -> float:
        with np.errstate(all="ignore"):
            loss = float(self.losses(weights, (self.dev[0][:count], self.dev[1][:count])).mean())
        return loss if math.isfinite(loss) else math.inf

    def tested(self, weights: np.ndarray) -> float:
        """The fall of the test loss."""
        with np.errstate(all="ignore"):
            return float((self.losses(self.base, self.test) - self.losses(weights, self.test)).mean())

    def gradient(self, weights: np.ndarray, step: int) -> tuple[float, np.ndarray, float]:
        """The projected gradient of a step, its direction, and the minibatch's mean loss."""
        chosen = self.minibatches[step]
        z = np.random.Generator(np.random.SFC64(self._seed + step)).standard_normal(len(weights))
        examples = (self.train[0][chosen], self.train[1][chosen])
        with np.errstate(all="ignore"):
            plus, minus = (float(self.losses(weights + sign * EPS * z, examples).mean()) for sign in (1, -1))
        return (plus - minus) / (2 * EPS), z, (plus + minus) / 2


def constant(problem: Problem, lr: float) -> tuple[float, float]:
    """The fall of the held-out loss of a run with one rate, measured ten times, and that of the test loss."""
    weights, every = problem.base, max(1, problem.steps // 10)
    best, best_weights = problem.held_out(weights), weights
    untuned = best
    for step in range(problem.steps):
        c, z, _ = problem.gradient(weights, step)
        with np.errstate(all="ignore"):
            weights = weights - lr * c * z
        if (step + 1) % every == 0 and (loss := problem.held_out(weights)) < best:
            best, best_weights = loss, weights
    return untuned - best, problem.tested(best_weights)


class Patient(Guard):
    """Goes back only when two held-out losses in a row are no gain."""

    failures = 0

    def measured(self, step: int, loss: float, *, is_last: bool = False) -> GoBack | None:
        self.failures = 0 if loss < self.best_loss else self.failures + 1
        return None if self.failures % 2 else super().measured(step, loss, is_last=is_last)


class Run:
    """A run that finds its rate: does in numpy what the library's search decides."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self._problem, self.weights, self.lr = problem, problem.base, math.nan
        self.steps, self._every = int(SHARE * problem.steps), max(1, problem.steps // rule.measurements)
        self._held: list[np.ndarray] | None = None
        #: Weights by the step after which they were measured.
        self._points = {0: problem.base}
        first = partial(first_rate, eps=EPS, momentum=0.0, otherwise=GRID[len(GRID) // 2])
        plan = Plan(HELD, 1, TRIES, self._every)
        self._search = RateSearch(plan, self.steps, self, first, measures=False, guard=rule.guard)
        self._search.begin()
        self._search.measured(0, problem.held_out(problem.base))

    def step(self, step: int) -> None:
        """Step number ``step``, from 1."""
        c, z, loss = self._problem.gradient(self.weights, step - 1)
        is_finite = math.isfinite(c)
        if self._held is not None:
            self._held.append(c * z if is_finite else 0 * z)
        elif is_finite:
            with np.errstate(all="ignore"):
                self.weights = self.weights - self.lr * c * z
        self._search.stepped(step, loss, (c,) if is_finite else ())
        if self._held is None and (step % self._every == 0 or step == self.steps):
            self._points[step] = self.weights
            self._search.measured(step, self.measure())

    def hold(self) -> None:
        self._held = []

    def try_rate(self, lr: float) -> float:
        return self._problem.held_out(self._at(lr), SEARCHED)

    def take(self, lr: float) -> None:
        self.weights, self._held = self._at(lr), None

    def measure(self) -> float:
        return self._problem.held_out(self.weights)

    def set_rate(self, lr: float) -> None:
        self.lr = lr

    def go_back(self, step: int, lr: float) -> None:
        self.weights, self.lr = self._points[step], lr

    def note(self, content: dict[str, Any]) -> None:
        pass

    def announce(self, text: str) -> None:
        pass

    def _at(self, lr: float) -> np.ndarray:
        return self._problem.base - lr * np.sum(self._held or [np.zeros_like(self.weights)], axis=0)


def found(problem: Problem, rule: Rule) -> tuple[float, float]:
    """The same of a run that finds its rate and follows a rule."""
    run = Run(problem, rule)
    for step in range(1, run.steps + 1):
        run.step(step)
    return problem.held_out(problem.base) - problem.held_out(run.weights), problem.tested(run.weights)


def gains(outcomes: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Means over seeds: of the fall of the held-out loss, and of that of the test loss."""
    held_out, test = zip(*outcomes, strict=True)
    return mean(held_out), mean(test)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--seeds", type=int, default=16)
    asked.add_argument("--output", default="rates")
    options = asked.parse_args()
    lengths = {100: (8, options.seeds), 300: (16, max(2, options.seeds // 2)), 1000: (16, max(2, options.seeds // 4))}
    shares: dict[str, dict[int, dict[str, list[float]]]] = {str(rule): {} for rule in RULES}
    for steps, (batch, seeds) in lengths.items():
        for name, kind in KINDS.items():
            problems = [Problem(kind, seed, steps, batch) for seed in range(seeds)]
            grid = [gains(constant(problem, lr) for problem in problems) for lr in GRID]
            best = [max(rate[which] for rate in grid) for which in range(2)]
            for rule in RULES:
                gain = gains(found(problem, rule) for problem in problems)
                shares[str(rule)].setdefault(steps, {})[name] = [x / y for x, y in zip(gain, best, strict=True)]
    print("| rule | " + " | ".join(f"{steps} steps | test" for steps in lengths) + " |")
    print("|---" * (1 + 2 * len(lengths)) + "|")
    for name, by_length in shares.items():
        columns = [column for found in by_length.values() for column in zip(*found.values(), strict=True)]
        print(f"| {name} | " + " | ".join(f"{mean(c):.0%} ({min(c):.0%})" for c in columns) + " |")
    write(options.output, {"seeds": options.seeds, "shares": shares})


if __name__ == "__main__":
    main()
