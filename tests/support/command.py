"""The command line, in this process and in one of its own, with a model and a task for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardtune.cli import main

from .models import TEXT

REVIEWS = [(text, number % 2) for number, text in enumerate(TEXT * 2)]
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
        options |= {"method": "mezo", "steps": STEPS, "batch_size": 4, "lr": 1e-3, "device": "cpu"}
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
