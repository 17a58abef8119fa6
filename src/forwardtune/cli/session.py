"""What the commands share: a model, a task, and its examples in tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import memory
from ..config import settings
from ..cores import SharedCores
from ..errors import InputError
from ..evaluation import evaluate, find_layout, prepare
from ..forgetting import token_losses
from ..models import context_length, model_kind
from ..noise import load_kernels
from ..objectives import Reward, logits_at
from ..objectives.mixture import parse
from ..processes import versions
from ..reference import with_reference
from ..storage import device_of
from ..strata import groups_by
from ..tasks import Split, Task, doubts, get_task, load_splits
from ..tasks.batching import Layout
from ..tasks.encoding import Encoded, Encoder
from ..tasks.weights import class_weights
from ..trajectory import Log
from ..workers import Alone
from . import say
from .model import keep_offloaded, open_model
from .progress import bar, reach


@dataclass
class Session:
    """A loaded model, its task as it is put to that kind of model, and the encoded splits.

    Attributes:
        options: what describes the run (:mod:`forwardtune.config`).
        calibrations: of the test split, where they were asked for.
        truncated: how many prompts were cut.
        demonstrations: how many stand before every prompt.
        skipped: how many rows were left out of each split's source because the task cannot use them.
        deadline: when tuning must end, by ``time.monotonic``.
        cores: what chooses the number of threads, on a CPU.
        workers: the processes that share the run.
        stratify: what minibatches are stratified by, ``label`` or ``none``.
        watched_by_loss: whether the development split has no metric, but its loss alone, beside the steps of the run.
    """

    model: Any
    tokenizer: Any
    task: Task
    splits: dict[str, list[Encoded]]
    layout: Layout
    options: Any
    calibrations: list[Encoded] | None = None
    truncated: int = 0
    demonstrations: int = 0
    rewards: Sequence[Reward] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    deadline: float | None = None
    cores: SharedCores | None = None
    workers: Alone = field(default_factory=Alone)
    watched_by_loss: bool = False
    stratify: str = "none"

    def evaluate(self, what: str, split: str = "test", **how: Any) -> dict[str, float]:
        """The task's metric and loss on a split, with a progress bar.

        Args:
            how: goes to :func:`~forwardtune.evaluation.evaluate`: ``loss_alone``, and what it is to fill, ``outcomes``, ``completions``.
        """
        examples, calibrations = self.splits[split], self.calibrations if split == "test" else None
        with bar(len(examples), what, "example") as progress:
            return self.measure(examples, calibrations=calibrations, progress=reach(progress), **how)

    def general_losses(self, what: str, text: str) -> list[float]:
        """The loss of each token of a text that is not the task's, with a progress bar."""
        with bar(1, what, "window") as progress:
            return token_losses(self.model, self.tokenizer, text, workers=self.workers, progress=reach(progress))

    def measure(self, examples: Sequence[Encoded], **how: Any) -> dict[str, float]:
        """The task's metric and loss on examples; ``how`` goes to :func:`~forwardtune.evaluation.evaluate`."""
        how = {"batch_size": self.options.batch_size, "layout": self.layout, "rewards": self.rewards, **how}
        return evaluate(self.model, self.tokenizer, self.task, examples, workers=self.workers, **how)

    def limit(self, split: str, count: int) -> None:
        """Keep so many examples of a split, spread over it."""
        whole = self.splits[split]
        if count < len(whole):
            self.splits[split] = [whole[i * len(whole) // count] for i in range(count)]
            say(f"{split}: {count} of the examples are measured (--{split}-examples says how many)")

    @property
    def metric(self) -> str:
        """What a model is judged by: the reward where there is one, else the task's metric."""
        return "reward" if self.rewards else self.task.metric

    def facts(self, command: str, method: str) -> dict[str, Any]:
        """What every command's ``metrics.json`` begins with."""
        return {
            "command": command,
            "method": method,
            "model": self.options.model,
            "task": self.task.name,
            "metric": self.metric,
            "settings": settings(self.options),
            "splits": {name: len(split) for name, split in self.splits.items()},
            "split_rule": self.task.splits,
            "truncated_prompts": self.truncated,
            **({"skipped_rows": self.skipped} if self.skipped else {}),
        }

    @property
    def longest(self) -> list[Encoded]:
        """The longest minibatch that can be drawn."""
        split = self.splits.get("train", self.splits["test"])
        return sorted(split, key=lambda example: example.length)[-self.options.batch_size :]

    def inference_peak(self) -> int:
        """Peak memory of one forward pass over the longest minibatch, in bytes."""
        batch = prepare(self.model, self.tokenizer, self.longest, self.layout)
        with torch.no_grad():
            return self.peak_of(lambda: logits_at(self.model, batch))

    def peak_of(self, work: Callable[[], object]) -> int:
        """Peak memory while that is done, in bytes."""
        device = device_of(self.model)
        memory.trim()
        memory.reset_peak(device)
        work()
        return memory.peak(device)


def open_session(
    options: Any,
    *wanted: str,
    shots: int = 0,
    calibrate: bool = False,
    prepare_model: Callable[[Any, Any, Task], Any] | None = None,
    resumed: Log | None = None,
    workers: Alone | None = None,
    folder: str | Path | None = None,
) -> Session:
    """Load task, data and model, in that order: what is cheap to refuse is refused first.

    Args:
        options: what describes the run (:mod:`forwardtune.config`).
        wanted: the splits to encode.
        shots: demonstrations before every prompt, drawn from the training split.
        calibrate: encode the test examples without content too.
        prepare_model: ``(model, tokenizer, task) -> model`` with what is to be tuned.
        resumed: the log of the run that goes on, with the number of threads that it had.
        workers: the processes that share the run; they must have the same data.
        folder: where weights may be kept on disk; by default where temporary files are.
    """
    workers = workers or Alone()
    cores = SharedCores(say)
    task = get_task(options.task, options.data, streaming=options.streaming)
    rewards = _rewards(task, options)
    splits = _load_splits(task, options, [*wanted, "train"] if shots and "train" not in wanted else wanted)
    for reward in rewards:
        for split in splits.values():
            for row in split.rows:
                reward.require(row)
    if shots and shots > len(splits["train"]):
        raise InputError(f"--shots {shots} asks for more than the {len(splits['train'])} training examples: lower it")

    model, tokenizer = open_model(options, folder)
    kind = model_kind(model)
    task = task.worded_for(kind)
    splits = {name: split.worded_for(kind) for name, split in splits.items()}
    if prepare_model is not None:
        load_kernels(model.device)  # before memory is measured
        model = prepare_model(model, tokenizer, task)
        keep_offloaded(model)
    room = context_length(model)  # a prefix takes some of it
    if room < 1:
        raise InputError("the prefix leaves no position of the model's context for text: lower --prefix-length")
    encoder = Encoder(tokenizer, min(options.max_length, room))
    if shots:
        draw = random.Random(f"{options.seed} {task.name} demonstrations")
        encoder.demonstrations = draw.sample(splits["train"].examples, shots)
    encoded = {}
    say(f"splits drawn by the rule {task.splits}{'' if options.per_class is None else ', of each class'}")
    for name in wanted:
        if name in splits:
            encoded[name] = encoder(task, splits[name].examples)
            say(f"{name}: {splits[name]}")
    task = _weighed(task, options, encoded)
    stratify = _strata(task, options)
    if encoder.truncated:
        say(f"  {encoder.truncated} prompts were cut on the left of their context to {encoder.max_length} tokens")
    if shots:
        say(f"  {encoder.demonstrated} of {shots} demonstrations fit before the longest prompt")
    some = next(iter(encoded.values()))
    if workers.count > 1:
        facts = versions() | {"seed": options.seed, "data with the digest": _digest(encoded)}
        workers.require_same(facts, "every rank must be started in the same way, on the same data")
    elif resumed is not None:  # several would each choose a number of threads for themselves
        from ..hf.log_keeper import noted_threads

        cores.follow(noted_threads(resumed, 0))
    elif options.device == "cpu":
        first = prepare(model, tokenizer, some[: options.batch_size])
        with torch.no_grad():
            cores.look(lambda: logits_at(model, first))
    if task.preference is not None and prepare_model is not None:  # a model that was tuned before has no reference
        for name in encoded:
            with bar(len(encoded[name]), f"reference of {name}", "example") as progress:
                encoded[name] = with_reference(
                    model, tokenizer, encoded[name], batch_size=options.batch_size, progress=reach(progress)
                )
    return Session(
        model,
        tokenizer,
        task,
        encoded,
        find_layout(model, tokenizer, some),
        options,
        calibrations=encoder.calibrations(task, splits["test"].examples) if calibrate else None,
        truncated=encoder.truncated,
        demonstrations=encoder.demonstrated,
        rewards=rewards,
        skipped={name: split.skipped for name, split in splits.items() if split.skipped},
        cores=cores if options.device == "cpu" and workers.count == 1 else None,
        workers=workers,
        stratify=stratify,
    )


def _digest(encoded: dict[str, list[Encoded]]) -> str:
    """Of the tokens of all splits."""
    tokens = [[(e.prompt, e.options) for e in split] for split in encoded.values()]
    return hashlib.blake2b(repr(tokens).encode(), digest_size=8).hexdigest()


def _load_splits(task: Task, options: Any, wanted: Sequence[str]) -> dict[str, Split]:
    """The splits, with a line for what was left out of them and for what makes them doubtful."""
    names = ("data_dir", "train_examples", "dev_examples", "test_examples", "per_class", "seed", "on_bad_row")
    splits = load_splits(task, only=wanted, **{name: getattr(options, name) for name in names})
    for split in {split.source: split for split in splits.values()}.values():  # train and dev may have one source
        if split.skipped:
            say(f"{split.skipped} rows of {split.source} are left out, the first because of: {split.first_skipped}")
    for doubt in doubts(splits):
        say(f"forwardtune: warning: {doubt}")
    return splits


def _rewards(task: Task, options: Any) -> list[Reward]:
    """The reward functions among the objective's terms."""
    objective = getattr(options, "objective", "loss")
    terms = parse(objective, task) if objective != "loss" else []
    rewards = [term.reward for term in terms if term.reward]
    if task.metric == "reward" and not rewards:
        raise InputError(
            f"task {task.name} has neither answers nor a target: give --objective module:function, a reward for what the "
            "model writes, or add answers or a target to the task file"
        )
    generates = any(term.generates for term in terms)
    for name, what in (("temperature", "sampled"), ("log_completions", "generated")):
        if getattr(options, name, None) and not generates:
            raise InputError(
                f"--{name.replace('_', '-')} is of {what} text, and objective {objective!r} generates none: leave it out"
            )
    return rewards


def _strata(task: Task, options: Any) -> str:
    """What minibatches are stratified by. Fills in how many of their examples share a direction, where that depends on the task."""
    if not hasattr(options, "stratify"):
        return "none"
    labels = len(task.answers or ()) if task.fixed_answers else 0
    if options.stratify == "label" and not labels:
        raise InputError(
            f"--stratify label spreads examples by their labels, and task {task.name} has no fixed ones: leave it out"
        )
    by = "label" if labels and options.stratify != "none" else "none"
    if options.group_size is None and options.assignment == "example":
        options.group_size = groups_by(labels, options.batch_size) if by == "label" else 1
    return by


def _weighed(task: Task, options: Any, encoded: dict[str, list[Encoded]]) -> Task:
    """The task with the weights of its classes that were asked for."""
    asked = getattr(options, "class_weights", None)
    if asked is None:
        return task
    if not any(term.name == "loss" for term in parse(options.objective, task)):
        raise InputError(
            f"--class-weights are of the loss, and --objective {options.objective} has none: leave them out"
        )
    weights = class_weights(asked, task, [example.label for example in encoded["train"]])
    say(
        "classes weigh "
        + ", ".join(f"{name} {weight:.3g}" for name, weight in zip(task.answers or (), weights, strict=True))
    )
    return replace(task, class_weights=weights)
