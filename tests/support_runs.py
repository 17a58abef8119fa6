"""What tests of whole runs share: models that have something to say, runs that are killed, and the command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import support
from forwardtune.cli import main
from forwardtune.tasks import Task
from forwardtune.tasks.batching import Layout
from forwardtune.tasks.encoding import Encoded

TOKENIZER = support.tokenizer()
CHOICE = Task("choice", "{text}", "label", {"0": "a", "1": "b"}, "accuracy")

# Layouts compute the same sums in float32, but batched matrix products and attention over longer rows add in another
# order: a few hundred additions of numbers up to 10 err by at most 1e-5.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}

PLAIN = [i for i in range(3, support.VOCABULARY) if (text := TOKENIZER.decode([i])).isascii() and text.isprintable()]

LAYOUTS = [None, *(Layout(0, shared=shared, packed=packed) for shared in (True, False) for packed in (True, False))]
every_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda found: f"shared={found.shared},packed={found.packed}" if found else "default"
)

# --- models ------------------------------------------------------------------------------------------------------


def sharpened(model: Any) -> Any:
    """A model whose attention matters: a freshly initialised one looks at nothing in particular."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def sharp_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return sharpened(support.tiny_model(family, dtype))


def talking_model(family: str = "llama") -> Any:
    """A model that produces printable text, and not the same token for ever."""
    model = sharp_model(family)
    head = torch.zeros(support.VOCABULARY, 32)
    head[PLAIN] = torch.randn(len(PLAIN), 32, generator=torch.Generator().manual_seed(3))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    return model


@contextlib.contextmanager
def inputs_of(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the token ids of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


def tokens(count: int, seed: int) -> list[int]:
    return support.token_batch(1, count, seed)[0].tolist()


def encoded(prompt: int, *options: int, label: int = 0, scored: int = 0) -> Encoded:
    """An example with so many tokens in its prompt and options."""
    texts = [tokens(n, 100 * i + n) for i, n in enumerate(options)]
    return Encoded(tokens(prompt, prompt), texts, (label,), scored=scored)


@torch.no_grad()
def naive_scores(model: Any, batch: Sequence[Encoded]) -> torch.Tensor:
    """The definition: one option at a time, all logits, the mean over the tokens of the answer."""
    scores = torch.full((len(batch), max(len(e.options) for e in batch)), -math.inf)
    for i, example in enumerate(batch):
        for j, option in enumerate(example.options):
            logits = model(input_ids=torch.tensor([example.prompt + option])).logits[0].float()
            log_p = logits.log_softmax(dim=-1)
            begin = len(example.prompt) - example.scored
            scored = (example.prompt + option)[begin:]
            scores[i, j] = torch.stack([log_p[begin - 1 + t, token] for t, token in enumerate(scored)]).mean()
    return scores


# --- runs --------------------------------------------------------------------------------------------------------

QUIET = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}


class KilledError(Exception):
    """Stands for anything that ends a run between two steps."""


class Kill(TrainerCallback):
    """Ends the run after so many steps: right when the last was logged, or when the next one begins."""

    def __init__(self, after: int, *, at_begin: bool = False) -> None:
        self.after, self.at_begin = after, at_begin

    def _kill(self, state: Any, begins: bool) -> None:
        if state.global_step == self.after and self.at_begin is begins:
            raise KilledError

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._kill(state, True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._kill(state, False)


def log_lines(path: Path) -> list[dict[str, Any]]:
    """A log (or the step log of a folder) without times, and so without checksums."""
    found = read(path / "steps.jsonl" if path.is_dir() else path)
    return [{key: value for key, value in line.items() if key not in ("seconds", "check")} for line in found]


# --- the command line --------------------------------------------------------------------------------------------

REVIEWS = [(text, number % 2) for number, text in enumerate(support.TEXT * 2)]
STEPS = 6


@dataclass
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str


def cli(*arguments: object) -> Ran:
    """Run a command in this process. Whatever happens, people see no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = int(exit.code or 0)
    assert "Traceback" not in err.getvalue()
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Ran:
    """Run a command that must succeed."""
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    return ran


def message_of(*arguments: object) -> str:
    """What a command says that is refused."""
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, ""), ran.err
    return ran.err.rpartition("error: ")[2]


@contextlib.contextmanager
def refused(folder: Path, words: str, code: int = 2) -> Iterator[Any]:
    """Inside, one command runs: it ends with the code and one clear message, and touches nothing under the folder."""
    before = files(folder)
    ran: list[Ran] = []
    yield ran.append
    assert (ran[0].code, ran[0].out) == (code, ""), ran[0].err
    message = ran[0].err.rpartition("error: ")[2]
    assert re.search(words, message, re.DOTALL), ran[0].err
    assert len(message.splitlines()) <= 3
    assert files(folder) == before


def process(*arguments: object) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    command = [sys.executable, "-m", "forwardtune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def read(path: Path) -> Any:
    """A JSON or JSON Lines file, or the metrics.json of a folder."""
    path = path / "metrics.json" if path.is_dir() else path
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, **changes: str | None) -> Path:
    """A task file with a JSON Lines file to train on and a CSV file to test on."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", [{"text": t, "label": n, "reply": t.split()[-1]} for t, n in REVIEWS])
    cells = [f"{text},{label},{text.split()[-1]}" for text, label in REVIEWS[:6]]
    (folder / "test.csv").write_text("\n".join(["text,label,reply", *cells]), encoding="utf-8")
    keys: dict[str, str | None] = {"prompt": "'{text} It was'", "answers": "{0: terrible, 1: great}"}
    keys |= {"train": "train.jsonl", "test": "test.csv", **changes}
    path = folder / "task.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None), encoding="utf-8")
    return path


#: What a task of free text says beside or in the place of the others.
FREE_TEXT = {"answers": None, "target": "reply", "max_new_tokens": "5", "stop": "''"}


@dataclass
class Setting:
    """A model, a task, and a command line that tunes the one on the other."""

    model: Path
    task: Path

    def train(self, folder: Path, **changes: object) -> list[object]:
        """Arguments of ``train``; None leaves an option out, True makes it a flag."""
        options: dict[str, object] = {"model": self.model, "task": self.task, "output_dir": folder}
        options |= {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "device": "cpu"}
        options |= {"eps": None if changes.get("method") == "adam" else 1e-3, **changes}
        return ["train", *flags(options)]

    def resume(self, folder: Path, **changes: object) -> list[object]:
        return ["train", *flags({"output_dir": folder, "resume": True, **changes})]

    def eval(self, **changes: object) -> list[object]:
        return ["eval", *flags({"model": self.model, "task": self.task, "device": "cpu", **changes})]


def flags(options: dict[str, object]) -> list[object]:
    found: list[object] = []
    for name, value in options.items():
        if value is not None:
            found += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", value]
    return found
