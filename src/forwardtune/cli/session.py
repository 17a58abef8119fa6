"""What train and eval share: a model, a task, and its examples in tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..errors import InputError
from ..evaluation import can_share_prompts, evaluate
from ..models import context_length, load_model
from ..tasks import Split, Task, get_task, load_split
from ..tasks.encoding import Encoded, Encoder
from . import positive, say

MODEL_DEFAULTS: dict[str, Any] = {
    "dtype": "auto",
    "device": None,
    "batch_size": 16,
    "max_length": 2048,
    "test_examples": 1000,
    "seed": 0,
    "data_dir": None,
}


@dataclass
class Session:
    """A loaded model, its task, and the encoded splits."""

    model: Any
    tokenizer: Any
    task: Task
    splits: dict[str, list[Encoded]]
    shared: bool
    options: argparse.Namespace

    def evaluate(self, what: str, outcomes: list[float] | None = None) -> dict[str, float]:
        """The task's metric and loss on the test split, with a progress bar; ``outcomes`` gets them by example."""
        with bar(len(self.splits["test"]), what, "example") as progress:
            return evaluate(
                self.model,
                self.tokenizer,
                self.task,
                self.splits["test"],
                batch_size=self.options.batch_size,
                shared=self.shared,
                progress=reach(progress),
                outcomes=outcomes,
            )


def open_session(options: argparse.Namespace, *split_names: str) -> Session:
    """Check the options, then load task, data and model, in that order: what is cheap to refuse is refused first."""
    for name in ("model", "task"):
        if not getattr(options, name):
            raise InputError(f"--{name} is missing")
    positive(options, "batch_size", "max_length", "test_examples")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed must be from 0 to 4294967295, got {options.seed}")
    task = get_task(options.task)
    splits = {name: _load(task, name, options) for name in split_names}

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"loading {options.model}")
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    count = sum(p.numel() for p in model.parameters())
    say(f"  {count / 1e6:.1f}M weights, {str(model.dtype).removeprefix('torch.')}, on {options.device}")
    encoder = Encoder(tokenizer, min(options.max_length, context_length(model)))
    encoded = {}
    for name, split in splits.items():
        encoded[name] = encoder(task, split.examples)
        chosen = f"{len(split.examples)} of {split.available}" if split.available > len(split.examples) else "all"
        say(f"{name}: {chosen} {'' if chosen != 'all' else f'{split.available} '}examples of {split.source}")
    if encoder.truncated:
        say(f"  {encoder.truncated} prompts were cut on the left to {encoder.max_length} tokens")
    shared = can_share_prompts(model, tokenizer, next(iter(encoded.values())))
    return Session(model, tokenizer, task, encoded, shared, options)


def bar(total: int, description: str, unit: str, initial: int = 0) -> Any:
    """A progress bar on stderr: speed and time left; rarely redrawn when nobody watches."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        mininterval=interval,
        dynamic_ncols=True,
        file=sys.stderr,
    )


def reach(progress: Any) -> Callable[[int, int], object]:
    """A function that moves the bar to ``done``."""
    return lambda done, total: progress.update(done - progress.n)


def _load(task: Task, name: str, options: argparse.Namespace) -> Split:
    limit = options.train_examples if name == "train" else options.test_examples
    return load_split(task, name, data_dir=options.data_dir, limit=limit, seed=options.seed)


def fill(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Give options that were not set their defaults."""
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
