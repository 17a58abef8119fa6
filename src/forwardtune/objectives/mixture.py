"""The objective that a user names: ``accuracy``, ``f1``, a reward function, or a sum of several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, nearest, warn
from ..storage import device_of
from ..tasks import Task, metrics
from ..tasks.encoding import Encoded
from ..workers import Alone
from .generation import GREEDY, Context, Sampling, Written, write
from .likelihood import score_loss, task_scores
from .rewards import Reward, load_reward


@dataclass(frozen=True)
class Term:
    """One part of an objective. ``loss`` is lowered, everything else is raised."""

    weight: float  # its factor, positive
    name: str  # loss, accuracy, a metric of generated text, or the reward's name
    reward: Reward | None = None

    @property
    def generates(self) -> bool:
        """Whether it is measured on what the model writes."""
        return self.name not in ("loss", "accuracy")


class TaskObjective:
    """A weighted sum of what is measured on a minibatch: one loss per example, lower is better.

    ``sum_i w_i * loss_i``, where ``accuracy``, metrics and rewards enter with a minus sign. No gradient is needed, and
    only ``loss`` has one. What several terms need is computed once: scores of the options, and the generated texts. A
    reward that is None for an example adds nothing to its sum, as in TRL.

    Args:
        specification: terms joined by ``+``, each with a factor or without: ``accuracy + 0.1 * loss``. Names are ``loss``,
            ``accuracy``, ``f1``, ``exact_match``, ``drop_f1``, ``drop_exact_match``, and ``module:function`` or
            ``path/to/file.py:function`` for a function in TRL's signature.
        sampling: how texts are generated; the seed is combined with the step's number.
        sample_steps: keep what was written at every so many steps, for :meth:`take_samples`; None keeps nothing.

    Raises:
        InputError: a term that does not suit the task, or cannot be read.
    """

    def __init__(
        self,
        specification: str,
        task: Task,
        tokenizer: Any,
        sampling: Sampling = GREEDY,
        sample_steps: int | None = None,
    ) -> None:
        self.task, self.specification = task, specification
        self.terms = parse(specification, task)
        self._rewards = {term.name for term in self.terms if term.reward is not None}
        self._tokenizer, self._sampling, self._sample_steps = tokenizer, sampling, sample_steps
        self._step, self._part, self._recording, self._warned = -1, 0, True, False
        self._seen: dict[str, list[float]] = {}
        self._samples: dict[int, list[dict[str, Any]]] = {}  # by part of the step

    @property
    def generates(self) -> bool:
        """Whether the model writes text at every evaluation."""
        return any(term.generates for term in self.terms)

    def begin_step(self, step: int, part: int = 0) -> None:
        """Say which step comes, and which microbatch of it: all its evaluations draw the same random numbers.

        Statistics are kept unless :meth:`end_step` was called after it.
        """
        self._step, self._part, self._recording = step, part, True

    def end_step(self) -> None:
        """Say that what is evaluated from now on, such as development examples, is no part of a step."""
        self._recording = False

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The objective of every example, float32, shape (batch,). Raises RewardError if a reward function failed.

        ``batch`` is from :func:`forwardtune.evaluation.prepare`, with the encoded ``examples`` where text is generated.
        """
        sampling = replace(self._sampling, seed=((self._sampling.seed * 1_000_003) + self._step) * 1009 + self._part)
        measured = _Measured(model, batch, self.task, self._tokenizer, sampling)
        parts: list[Tensor] = []
        values_of: dict[str, list[float]] = {}
        for term in self.terms:
            values = measured.values(term)
            part = (term.weight if term.name == "loss" else -term.weight) * values
            # A reward is finite, or NaN where the function gave None.
            parts.append(part if term.reward is None else part.nan_to_num(nan=0.0))
            values_of[term.name] = values.detach().tolist()
        self._warn_of_what_is_not_judged(values_of)
        if self._recording:
            for name, seen in values_of.items():
                self._seen.setdefault(name, []).extend(seen)
            if self._sample_steps and self.generates and (self._step + 1) % self._sample_steps == 0:
                self._samples[self._part] = measured.samples(values_of)
        return sum(parts[1:], parts[0])

    def take_statistics(self) -> dict[str, dict[str, float]]:
        """Mean and standard deviation of every term over the examples evaluated since the last call.

        Where a reward was None for some of them, both are of the others (NaN if there are none), and ``none`` counts them.
        """
        seen, self._seen = self._seen, {}
        statistics = {}
        for name, values in seen.items():
            known = [value for value in values if name not in self._rewards or not math.isnan(value)]
            tensor = torch.tensor(known or [math.nan], dtype=torch.float64)
            statistics[name] = {"mean": float(tensor.mean()), "std": float(tensor.std(correction=0))}
            if len(known) < len(values):
                statistics[name]["none"] = len(values) - len(known)
        return statistics

    def take_samples(self) -> list[dict[str, Any]]:
        """Prompts, completions and terms of the last evaluation of each of the step's parts, if it is a step to keep."""
        samples, self._samples = self._samples, {}
        return [sample for part in sorted(samples) for sample in samples[part]]

    def gather(self, workers: Alone) -> None:
        """Take over what was seen and written where other workers evaluated this objective, all of them at once."""
        if workers.count == 1:
            return
        seen: dict[str, list[float]] = {}
        samples: dict[int, list[dict[str, Any]]] = {}
        for own, written in workers.all((self._seen, list(self._samples.items()))):
            for name, values in own.items():
                seen.setdefault(name, []).extend(values)
            samples |= dict(written)
        self._seen, self._samples = seen, samples

    def _warn_of_what_is_not_judged(self, values_of: dict[str, list[float]]) -> None:
        if self._warned or len(self._rewards) < len(self.terms):
            return
        of_examples = list(zip(*values_of.values(), strict=True))
        idle = sum(all(map(math.isnan, values)) for values in of_examples)
        if idle:
            self._warned = True
            warn(
                f"objective {self.specification!r}: all rewards are None for {idle} of {len(of_examples)} completions. They "
                "count as 0 and teach nothing: leave such examples out of the data, or add a reward for them"
            )


@dataclass
class _Measured:
    """What was computed of one minibatch at one point."""

    model: Any
    batch: Mapping[str, Any]
    task: Task
    tokenizer: Any
    sampling: Sampling

    @cached_property
    def _scores(self) -> Tensor:
        return task_scores(self.model, self.batch, self.task)

    @cached_property
    def _written(self) -> Written:
        examples: Sequence[Encoded] = self.batch["examples"]
        prompts = [example.prompt[: len(example.prompt) - example.scored] for example in examples]
        common = prompts[0][: self.batch.get("common", 0)]
        context = Context.of(self.model, common) if common else None  # at the present point
        return write(self.model, self.tokenizer, self.task, prompts, context, self.sampling)

    def samples(self, values_of: dict[str, list[float]]) -> list[dict[str, Any]]:
        """A line for each example: its prompt, its completion, and the value of every term."""
        rows = zip(self.batch["examples"], self._written.texts, *values_of.values(), strict=True)
        return [
            {"prompt": e.example.prompt, "completion": text, "objective": dict(zip(values_of, values, strict=True))}
            for e, text, *values in rows
        ]

    def values(self, term: Term) -> Tensor:
        """Values of a term, shape (batch,); NaN where a reward is None."""
        if term.name == "loss":
            return score_loss(self.task, self._scores, self.batch["labels"])
        if term.name == "accuracy":
            if self.task.preference is not None:
                return (self._scores > 0).float()
            chosen = self._scores.argmax(dim=1)
            if "examples" not in self.batch:
                return (chosen == self.batch["labels"]).float()
            right = [float(c in e.right) for c, e in zip(chosen.tolist(), self.batch["examples"], strict=True)]
            return torch.tensor(right, device=chosen.device)
        examples: Sequence[Encoded] = self.batch["examples"]
        if term.reward is not None:
            given = term.reward([e.example for e in examples], self._written.texts, self._written.tokens)
            values = [math.nan if value is None else value for value in given]
        else:
            pairs = zip(self._written.texts, examples, strict=True)
            values = [metrics.score(term.name, text, example.texts) for text, example in pairs]
        return torch.tensor(values, dtype=torch.float32, device=device_of(self.model))  # where the losses are


_TERM = re.compile(r"(?:([0-9.eE+-]+)\s*\*\s*)?([\w.]+(?::\w+)?|.+\.py:\w+)")


def parse(specification: str, task: Task) -> list[Term]:
    """The terms of a specification, checked against the task."""
    terms = []
    # A plus sign inside a number such as 1e+2 does not separate terms.
    for part in re.split(r"(?<![0-9][eE])\+", specification):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"objective {specification!r} cannot be read at {part.strip()!r}: give names joined by +, each with a "
                "positive factor or without, such as accuracy + 0.1 * loss. A reward is module:function or "
                "path/to/file.py:function (without a + in the path)"
            )
        terms.append(_term(match[1], match[2], specification, task))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise InputError(f"objective {specification!r} names a term twice: give it once, with the sum of the factors")
    return terms


def _term(factor: str | None, name: str, specification: str, task: Task) -> Term:
    try:
        weight = 1.0 if factor is None else float(factor)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise InputError(
            f"objective {specification!r}: the factor {factor} of {name} is not a positive number. loss is lowered and "
            "everything else raised, so no minus sign is needed"
        )
    if ":" in name:
        if not task.free_text:
            kind = (
                "of conversations: give data with a prompt alone"
                if task.conversational
                else "a choice: give a task without answers"
            )
            raise InputError(
                f"objective {specification!r}: {name} rewards what the model writes, and task {task.name} is {kind}"
            )
        return Term(weight, name, load_reward(name, weight))
    suits = ["accuracy"] if not task.free_text else list(metrics.related(task.metric)) if task.label else []
    suits = [] if task.conversational else suits
    suits += ["loss"] if task.loss != "none" else []
    if name not in suits:
        raise InputError(
            f"objective {specification!r}: {name!r} does not suit task {task.name}: choose from "
            f"{', '.join(suits) or 'rewards'}{', or module:function' if task.free_text else ''}{nearest(name, suits)}"
        )
    return Term(weight, name)
